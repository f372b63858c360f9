"use strict";
// Sorting of tables and searching of prompts; the page is whole without either.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.dataset.sort) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => {
        const text = row.cells[column].dataset.value ?? row.cells[column].textContent;
        return head.dataset.sort === "number" ? Number(text) : text;
      };
      const rows = [...body.rows].sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
      body.append(...(up ? rows : rows.reverse()));
    });
  });
}
for (const place of document.querySelectorAll("[data-search]")) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  const said = document.createElement("output");
  input.type = "search";
  label.append(place.dataset.search + " ", input);
  place.append(label, " ", said);
  const items = [...document.querySelectorAll(place.dataset.items)];
  input.addEventListener("input", () => {
    const wanted = input.value.toLocaleLowerCase();
    let found = 0;
    for (const item of items) {
      item.hidden = !item.textContent.toLocaleLowerCase().includes(wanted);
      found += item.hidden ? 0 : 1;
    }
    said.textContent = wanted ? `${found} of ${items.length}` : "";
  });
}
