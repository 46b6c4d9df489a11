"use strict";
const form = document.getElementById("filters");
const fields = ["task", "model", "method"];

// The choices live in the address too, so that a filtered page can be linked: #method=flora&task=eurosat
function chosen() {
  return new URLSearchParams(fields.map((f) => [f, form.elements[f].value]).filter((pair) => pair[1]));
}

function fits(element, choice) {
  return [...choice].every(([f, value]) => !(f in element.dataset) || element.dataset[f] === "" || element.dataset[f] === value);
}

function apply() {
  const choice = chosen();
  let shown = 0, all = 0;
  for (const section of document.querySelectorAll("section.filtered")) {
    let here = 0;
    for (const line of section.querySelectorAll("tbody")) {
      line.hidden = !fits(line, choice);
      here += line.hidden ? 0 : 1;
      all += 1;
    }
    for (const figure of section.querySelectorAll("figure")) figure.hidden = !fits(figure, choice);
    section.hidden = here === 0;
    document.querySelector(`nav a[href="#${section.id}"]`).hidden = here === 0;
    shown += here;
  }
  document.getElementById("shown").value = `${shown} of ${all} lines`;
}

function read() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (fields.some((f) => wanted.has(f))) {
    for (const f of fields) form.elements[f].value = wanted.get(f) ?? "";
  }
  apply();
}

function choose() {
  history.replaceState(null, "", "#" + chosen());
  apply();
}

form.addEventListener("change", choose);
document.getElementById("all").addEventListener("click", () => {
  form.reset();
  choose();
});
form.addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("hashchange", read);
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.open");
  if (!button) return;
  const more = button.closest("tbody").querySelector(".more");
  more.hidden = !more.hidden;
  button.setAttribute("aria-expanded", String(!more.hidden));
});
read();
