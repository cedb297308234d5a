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
