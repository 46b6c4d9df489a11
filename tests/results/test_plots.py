"""Figures: texts that neither overlap nor are cut, markers apart, no point alone, no name twice, no empty axes."""

import itertools

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text

from flora.results.cells import Table
from flora.results.looks import LOOK
from flora.results.plots import apart, plots
from flora.results.rows import Row
from flora.tasks.imagefolder.confusion import confusion
from flora.tasks.vqa.dialogues import Dialogue
from flora.tasks.vqa.sheet import sheet

KINDS = ["pareto", "rank", "curves", "norms", "radar", "cost"]
TITLE = "First table (VTAB-1K protocol), adapters at the budget of LoRA r = 8, learning rate chosen on validation"
HISTORY = [{"step": s, "loss": 2 / s, "delta_norm": 0.1 * s, "amplification": 2.0 + s} for s in range(10, 60, 10)]


def record(value, params, **changes):
    facts = {"value": value, "trainable_params": params, "head_params": 3000, "metric": "accuracy", "sha256": "0"}
    return facts | {"run_id": "r", "device": "gpu", "train_seconds": 2.0, "peak_memory_bytes": 10, **changes}


def line(task, method, settings, params, value=0.9, seeds=3, **changes):
    records = {seed: record(value + 0.01 * seed, params, **changes) for seed in range(seeds)}
    return Row(task, "convnext", method, settings, records, cells=seeds)


def a_table():
    """Four adapters at one budget, two ranks of two of them, three data sets; costs are known of those with LoRA's."""
    rows = []
    for at, task in enumerate(("caltech101", "eurosat", "dsprites_location")):
        block = [
            line(task, "linear_probe", "", 0, 0.5),
            line(task, "full", "", 3_400_000, 0.93),
            *(
                line(task, method, f"budget=match:lora:8, r={r}", 160_000 * r // 8 + at, 0.9 + at / 100)
                for method in ("lora", "dora", "flora", "flora_nocore")
                for r in (8, 16)
            ),
        ]
        for row in block:
            row.lora = block[2].records
        rows += block
    return rows


def drawn(rows, kinds=KINDS, history=HISTORY):
    table = Table("made_up", "mini", {"title": TITLE, "figures": kinds}, [])
    with plt.rc_context(LOOK):
        for plot in plots(table, rows, lambda _: {"history": history}):
            figure = plot.draw()
            figure.canvas.draw()
            yield plot.kind, figure
            plt.close(figure)


def texts(figure):
    """Texts that are drawn, with their boxes: ticks beyond the ends of an axis have texts that are not."""
    beyond = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    beyond |= {tick.label1, tick.label2}
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in beyond]
    return [(text.get_text(), text.get_window_extent()) for text in shown]


def check(figure):
    whole, found = figure.bbox.padded(1), texts(figure)
    for text, box in found:
        inside = whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
        assert inside, f"{text!r} is cut: {box.extents} in {figure.bbox.extents}"
    for (one, a), (other, b) in itertools.combinations(found, 2):
        assert not a.padded(-0.5).overlaps(b.padded(-0.5)), f"{one!r} overlaps {other!r}"
    assert all(axes.has_data() for axes in figure.axes)


def test_texts_of_figures_neither_overlap_nor_are_cut_and_no_axes_are_empty():
    kinds = set()
    for kind, figure in drawn(a_table()):
        kinds.add(kind)
        check(figure)
        names = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        assert len(names) == len(set(names)), kind
        assert names or kind == "cost"
    assert kinds == set(KINDS)


def test_budgets_in_a_narrow_range_have_labels_that_can_be_read():
    rows = [line("stsb", "lora", "", 332_000), line("stsb", "flora", "", 334_500)]
    ((_, figure),) = drawn(rows, ["pareto"])
    check(figure)
    labels = [text for text, _ in texts(figure) if text.endswith("k")]
    assert len(labels) >= 3
    assert all("10^" not in label for label in labels)


def test_markers_at_equal_budgets_stand_apart_and_the_axis_says_so():
    rows = [line("eurosat", method, "", 160_000) for method in ("lora", "dora", "flora")]
    rows.append(line("eurosat", "full", "", 3_400_000))
    ((_, figure),) = drawn(rows, ["pareto"])
    (axes,) = figure.axes
    at = sorted(axes.transData.transform((c.lines[0].get_xdata()[0], 0))[0] for c in axes.containers)
    assert min(np.diff(at)) > 7 * figure.dpi / 72  # a marker's width
    assert "set apart" in axes.get_xlabel()
    ((_, figure),) = drawn(rows[2:], ["pareto"])
    assert "set apart" not in figure.axes[0].get_xlabel()
    places = apart([1.0, 5.0, 1.0, 1.01])
    assert places[1] == 5.0
    assert places[0] < places[2] < places[3]
    assert np.mean([places[0], places[2], places[3]]) == pytest.approx(np.mean([1.0, 1.0, 1.01]))


def test_a_single_point_is_no_figure():
    one = line("eurosat", "flora", "r=8", 160_000)
    assert not list(drawn([one], history=HISTORY[:1]))
    assert not list(drawn([one, line("eurosat", "lora", "r=8", 160_000)], ["rank", "radar", "cost"]))
    assert {kind for kind, _ in drawn([one])} == {"curves", "norms"}  # a line each


def test_settings_of_one_method_look_different():
    rows = [line("eurosat", "flora", f"init={name}", 160_000 + n) for n, name in enumerate(("paper", "hosvd", "nlu"))]
    ((_, figure),) = drawn(rows, ["pareto"])
    handles = figure.legends[0].legend_handles
    assert len({handle.get_fillstyle() for handle in handles}) == 3
    assert len({handle.get_color() for handle in handles}) == 1


def test_costs_that_cannot_be_compared_are_named_instead_of_drawn():
    rows = [line("eurosat", "lora", "", 1000), line("eurosat", "full", "", 2000)]
    rows.append(line("eurosat", "flora", "", 1000, device="cpu"))
    for row in rows:
        row.lora = rows[0].records
    ((_, figure),) = drawn(rows, ["cost"])
    check(figure)
    assert "not run as LoRA was: flora" in figure.get_suptitle()
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["lora", "full"]


@pytest.mark.parametrize("classes", [2, 15, 40])
def test_a_confusion_picture_has_names_and_up_to_fifteen_classes_numbers(classes):
    counts = np.diag(np.full(classes, 990)) + np.eye(classes, k=1, dtype=int)
    names = [f"a class with a rather long name {n}" for n in range(classes)]
    figure = confusion(counts, names)
    figure.draw_without_rendering()
    if classes < 16:  # beyond, slanted boxes of names overlap though their letters do not
        inside = [text.get_text() for text in figure.axes[0].texts]
        assert inside.count("100") == classes
        assert inside.count("<1") == classes - 1
    whole = figure.bbox.padded(1)
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 for _, box in texts(figure))
    boxes = [box for text, box in texts(figure) if "(" in text]
    assert len(boxes) == classes + 1  # names with their counts, and the axis
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes[:-1]))


@pytest.mark.parametrize("count", [1, 3, 7, 24])
def test_a_sheet_of_answers_has_a_frame_for_each_and_no_other(count):
    class Images:
        def rgb(self, name):
            return np.zeros((8, 8, 3), np.uint8)

    asked = "what is the colour of the largest shape in the middle of the picture, as a child would call it"
    dialogue = Dialogue(((asked, "red"),), (0,), ("red",), "other", "row 0")
    figure = sheet([(dialogue, "a bluish green")] * count, Images())
    figure.draw_without_rendering()
    assert len(figure.axes) == count
    check(figure)
