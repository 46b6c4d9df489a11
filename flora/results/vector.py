"""SVG as matplotlib writes it, made small: what shows nothing goes, and numbers keep the digits that can be seen."""

import re
from itertools import count
from xml.etree import ElementTree

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_PLACES = ("d", "x", "y", "transform", "width", "height")
_FONT = "DejaVu Sans,Verdana,sans-serif"  # without quotes, as a page's address of a picture takes one kind
_SAID_ANYWAY = re.compile(
    r"font-family:[^;]*(;|$)|stroke-linejoin: (round|miter)(;|$)|stroke-linecap: (butt|square)(;|$)|opacity: 1(;|$)"
    r"|stroke-dashoffset: 0(;|$)|text-anchor: start(;|$)"
)
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _LINK)


def small(svg: str, note: str) -> str:
    """A picture in fewer bytes; texts stay texts.

    Args:
        svg: as matplotlib writes it with ``svg.fonttype: none``.
        note: what the picture carries, for `noted`.
    """
    root = ElementTree.fromstring(svg)
    used = dict(zip(dict.fromkeys(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)), map(str, count()), strict=False))
    looks: dict[str, str] = {}
    _thin(root, {name: f"m{number}" for name, number in used.items()}, looks)
    root.set("font-family", _FONT)
    rules = "".join(f".{name}{{{style}}}" for style, name in looks.items())
    for number, (tag, text) in enumerate((("desc", note), ("style", "*{stroke-linejoin:round}" + rules))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}")
        element.text = text
        root.insert(number, element)
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode").replace(" />", "/>")) + "\n"


def noted(svg: str) -> str | None:
    """The note that ``small`` put into a picture; None where there is none."""
    match = re.match(r"<svg[^>]*><desc>([^<]*)</desc>", svg)
    return match[1] if match else None


def _thin(element: ElementTree.Element, used: dict[str, str], looks: dict[str, str]) -> None:
    """Thin out an element and those in it.

    Args:
        element: the element.
        used: new ids by the old ones that something refers to.
        looks: styles so far, and the class that stands for each.
    """
    inside = []
    for child in element:
        if child.tag.rpartition("}")[2] in ("metadata", "style"):
            continue
        _thin(child, used, looks)
        inside += list(child) if child.tag == f"{{{_SVG}}}g" and not child.attrib else [child]
    element[:] = inside
    for name, value in list(element.attrib.items()):
        if name == "id":
            value = used.get(value, "")
        elif name in (f"{{{_LINK}}}href", "clip-path"):
            value = re.sub(r"#(\w+)", lambda link: f"#{used[link[1]]}", value)
        elif name == "style":
            style = _SAID_ANYWAY.sub("", value).strip("; ").replace(": ", ":").replace("; ", ";")
            value, name = "", "class"
            del element.attrib["style"]
            if style:
                value = looks.setdefault(style, f"c{len(looks)}")
        elif name in _PLACES:
            value = re.sub(r"\s+", " ", re.sub(r"-?\d+\.\d+(?:e-?\d+)?", _rounded, value)).strip()
            value = re.sub(r"rotate\(-?0 [^)]*\)", "", value)
        if name == "d":
            value = re.sub(r" ?([A-Za-z]) ?", r"\1", value)
            value = re.sub(r"(?<=[ML])[^A-Za-z]+(?:L[^A-Za-z]+)+", lambda run: run[0].replace("L", " "), value)
        if value:
            element.set(name, value)
        else:
            element.attrib.pop(name, None)


def _rounded(number: re.Match[str]) -> str:
    return f"{round(float(number[0]), 1) + 0.0:.1f}".removesuffix(".0")  # no -0
