"use strict";
const form = document.getElementById("filters");
const fields = ["task", "model", "method"];
const boxes = (field) => [...form.querySelectorAll(`input[name="${field}"]`)];
const sections = [...document.querySelectorAll(".section")];
const lines = new Map(sections.map((section) => [section, [...section.querySelectorAll("tbody.line")]]));
let sorting = null;  // [section's id, column, "ascending" or "descending"]

// What is chosen lives in the address, so that a page as it is seen can be linked:
// #method=flora&method=lora&task=eurosat&empty=1&sort=vtab.4.descending&at=vtab
function chosen() {
  const choice = new URLSearchParams();
  for (const field of fields) for (const box of boxes(field)) if (box.checked) choice.append(field, box.value);
  if (form.elements.empty.checked) choice.append("empty", "1");
  if (sorting) choice.append("sort", sorting.join("."));
  return choice;
}

function fits(element, choice) {
  return fields.every((f) => !choice.has(f) || !element.dataset[f] || choice.getAll(f).includes(element.dataset[f]));
}

function apply() {
  const choice = chosen(), filtered = fields.some((f) => choice.has(f));
  let shown = 0, all = 0;
  for (const section of sections) {
    const rows = lines.get(section);
    let here = 0;
    for (const line of rows) {
      line.hidden = !fits(line, choice) || (line.classList.contains("missing") && !choice.has("empty"));
      here += line.hidden ? 0 : 1;
    }
    for (const figure of section.querySelectorAll("figure")) figure.hidden = !fits(figure, choice);
    section.hidden = rows.length ? here === 0 : filtered;
    shown += here;
    all += rows.length;
  }
  for (const filter of form.querySelectorAll(".filter")) {
    const names = choice.getAll(filter.dataset.field);
    filter.querySelector("b").textContent = names.length > 2 ? `${names.length} chosen` : names.join(", ") || "all";
  }
  document.getElementById("shown").value = `${shown} of ${all} lines`;
}

function number(text) {
  const value = parseFloat(text.replaceAll(",", ""));
  return Number.isNaN(value) ? null : value;
}

function sort() {
  for (const section of sections) {
    const table = section.querySelector("table"), rows = [...lines.get(section)];
    for (const head of table?.querySelectorAll("th") ?? []) head.removeAttribute("aria-sort");
    const here = sorting && sorting[0] === section.id && table.querySelectorAll("thead th")[sorting[1]];
    if (here) {
      here.setAttribute("aria-sort", sorting[2]);
      const sign = sorting[2] === "descending" ? -1 : 1;
      const key = (line) => line.rows[0].cells[sorting[1]].textContent.trim();
      const keyed = rows.map((line) => [line, key(line)]);
      const [absent, present] = [keyed.filter((k) => k[1] === "-"), keyed.filter((k) => k[1] !== "-")];
      const numeric = present.every((k) => number(k[1]) !== null);
      present.sort((a, b) => sign * (numeric ? number(a[1]) - number(b[1]) : a[1].localeCompare(b[1])));
      rows.splice(0, rows.length, ...[...present, ...absent].map((k) => k[0]));
    }
    if (lines.get(section).length) table.append(...rows);
    table?.classList.toggle("sorted", Boolean(here));
  }
}

function jump(id) {
  const section = sections.find((other) => other.id === id);
  if (!section || section.hidden) return;
  section.open = true;
  section.scrollIntoView();
}

function read() {
  const hash = location.hash.slice(1);
  const wanted = new URLSearchParams(hash.includes("=") ? hash : `at=${hash}`);
  if (hash.includes("=")) {
    for (const f of fields) for (const box of boxes(f)) box.checked = wanted.getAll(f).includes(box.value);
    form.elements.empty.checked = wanted.has("empty");
    const [column, order] = (wanted.get("sort") ?? "").split(".").slice(-2);
    sorting = order ? [wanted.get("sort").split(".").slice(0, -2).join("."), Number(column), order] : null;
  }
  sort();
  apply();
  if (wanted.get("at")) jump(wanted.get("at"));
}

function choose(at) {
  const choice = chosen();
  if (at) choice.append("at", at);
  history.replaceState(null, "", "#" + choice);
  apply();
}

form.addEventListener("change", () => choose());
form.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("all").addEventListener("click", () => {
  form.reset();
  sorting = null;
  sort();
  choose();
});
document.getElementById("unfold").addEventListener("click", () => {
  const open = sections.some((section) => !section.hidden && !section.open);
  for (const section of sections) section.open = open;
});
window.addEventListener("hashchange", read);
window.addEventListener("beforeprint", () => sections.forEach((section) => (section.open = true)));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") for (const filter of form.querySelectorAll(".filter")) filter.open = false;
});
document.addEventListener("click", (event) => {
  for (const filter of form.querySelectorAll(".filter")) if (!filter.contains(event.target)) filter.open = false;
  const link = event.target.closest('a[href^="#"]'), head = event.target.closest("thead button");
  const button = event.target.closest("button.open");
  if (link) {
    event.preventDefault();
    choose(link.hash.slice(1));
    jump(link.hash.slice(1));
  } else if (head) {
    const th = head.closest("th"), before = th.getAttribute("aria-sort");
    const order = { null: "ascending", ascending: "descending" }[before];
    sorting = order ? [th.closest(".section").id, th.cellIndex, order] : null;
    sort();
    choose();
  } else if (button) {
    const more = button.closest("tbody").querySelector(".more");
    more.hidden = !more.hidden;
    button.setAttribute("aria-expanded", String(!more.hidden));
  }
});
read();
