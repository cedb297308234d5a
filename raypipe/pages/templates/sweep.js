"use strict";
// A click on a heading sorts the table of settings by that column, numbers as numbers; another one turns the order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = head.querySelector("button");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value;
      const compare = (a, b) => {
        if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === "");  // empty cells come last
        const numbers = !isNaN(value(a)) && !isNaN(value(b));
        const order = numbers ? value(a) - value(b) : value(a) < value(b) ? -1 : Number(value(a) > value(b));
        return down ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

// A click enlarges a picture; the arrows go on to the next value and to the next image. Texts go in as text.
const viewer = document.getElementById("viewer");
let cell = null;

function enlarge(target) {
  const button = target?.querySelector(".zoom");
  if (!button) return;
  cell = target;
  viewer.querySelector("img").src = button.querySelector("img").src;
  viewer.querySelector(".viewer-name").textContent = button.dataset.text;
  if (!viewer.open) viewer.showModal();
}

const STEPS = {
  left: () => cell.previousElementSibling, right: () => cell.nextElementSibling,
  up: () => cell.parentElement.previousElementSibling?.cells[cell.cellIndex],
  down: () => cell.parentElement.nextElementSibling?.cells[cell.cellIndex],
};
for (const button of document.querySelectorAll(".zoom")) button.addEventListener("click", () => enlarge(button.closest("td")));
for (const button of viewer.querySelectorAll("[data-step]")) button.addEventListener("click", () => enlarge(STEPS[button.dataset.step]()));
viewer.querySelector(".close").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener("close", () => cell.querySelector(".zoom").focus());
viewer.addEventListener("keydown", (event) => {
  const step = STEPS[event.key.replace("Arrow", "").toLowerCase()];
  if (step) { event.preventDefault(); enlarge(step()); }
});
