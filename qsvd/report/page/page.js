"use strict";
(() => {
  const root = document.documentElement, byId = (id) => document.getElementById(id);
  const theme = byId("theme"), system = matchMedia("(prefers-color-scheme: dark)");
  const stored = { get: () => { try { return localStorage.getItem("qsvd-theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("qsvd-theme", value); } catch { /* the page works without */ } } };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => { theme.setAttribute("aria-pressed", String(isDark())); };
  if (["light", "dark"].includes(stored.get())) root.dataset.theme = stored.get();
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored.set(root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();

  const key = (cell, isNumber) => {
    const text = cell.textContent.trim().replace(/,/g, "");
    if (!isNumber) return text;
    const factors = text.split(" x ").map(parseFloat);
    return factors.reduce((product, factor) => product * factor, 1);
  };
  for (const table of document.querySelectorAll("table.sorts")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const isNumber = head.classList.contains("n");
        const first = isNumber ? "descending" : "ascending", other = isNumber ? "ascending" : "descending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        const sign = order === "ascending" ? 1 : -1;
        heads.forEach((one) => one.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const rows = [...body.rows].map((row) => [key(row.cells[column], isNumber), row]);
        rows.sort(([a], [b]) => sign * (isNumber ? a - b : a.localeCompare(b, "en", { numeric: true })));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  const filter = byId("filter");
  if (filter) {
    const role = byId("role"), count = byId("count"), rows = [...document.querySelector("table.sorts").tBodies[0].rows];
    const apply = () => {
      const part = filter.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        const fits = row.cells[0].textContent.toLowerCase().includes(part)
          && (!role.value || row.cells[1].textContent === role.value);
        row.hidden = !fits;
        shown += fits;
      }
      count.textContent = `${shown} of ${rows.length} shown`;
    };
    filter.closest(".tools").hidden = false;
    filter.addEventListener("input", apply);
    role.addEventListener("change", apply);
    apply();
  }
})();
