"use strict";
(() => {
  const { config, specs, data } = JSON.parse(document.getElementById("chart-data").textContent);

  // Tables: numbers by value, infinity above every number and NaN above infinity; what is absent stays last.
  const rank = (cell, numeric) => {
    const text = (cell.dataset.value ?? cell.textContent).trim();
    if (text === "–" || text === "") return null;
    if (!numeric) return text;
    if (/^nan$/i.test(text)) return [1, 0];
    if (/^[-+]?inf$/i.test(text)) return [0, text.startsWith("-") ? -Infinity : Infinity];
    return [0, Number(text.replaceAll(",", ""))];
  };
  const compare = (a, b, numeric) =>
    numeric ? a[0] - b[0] || (a[1] === b[1] ? 0 : a[1] < b[1] ? -1 : 1) : a.localeCompare(b, "en", { numeric: true });

  const sortBy = (table, header) => {
    const numeric = header.dataset.sort === "number";
    const current = header.getAttribute("aria-sort");
    // The first click on a column of figures brings the largest to the top: that is what one looks for.
    const descending = current === "none" ? numeric : current === "ascending";
    const column = [...header.parentNode.children].indexOf(header);
    for (const other of header.parentNode.children) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => [rank(row.cells[column], numeric), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return (descending ? -1 : 1) * compare(a, b, numeric);
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const header of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      header.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sortBy(table, header));
    }
  }

  // Scripts: copied by the clipboard where the page may use it, else by a selection.
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      return done;
    }
  };
  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.setAttribute("aria-live", "polite");
    button.addEventListener("click", async () => {
      const done = await copy(button.parentNode.querySelector("code").textContent);
      button.textContent = done ? "Copied" : "Select the text and copy it";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  // Charts: each data set is kept in columns, and turned into the rows that a chart asks for.
  const rowsOf = (columns, key, value) => {
    const names = Object.keys(columns);
    const wanted = key === undefined ? null : columns[key];
    const rows = [];
    for (let i = 0; i < columns[names[0]].length; i++) {
      if (wanted && String(wanted[i]) !== value) continue;
      rows.push(Object.fromEntries(names.map((name) => [name, columns[name][i]])));
    }
    return rows;
  };

  const views = new Map();
  const draw = async (element) => {
    if (views.has(element)) return;
    views.set(element, null);
    const { spec, source, whereKey, whereValue } = element.dataset;
    const rows = rowsOf(data[source], whereKey, whereValue);
    element.classList.toggle("fit", specs[spec].width === "container");
    try {
      const result = await window.vegaEmbed(element, { ...specs[spec], datasets: { [source]: rows } }, {
        actions: false,
        ast: true,
        config,
        defaultStyle: false,
        mode: "vega-lite",
        renderer: "svg",
        tooltip: { disableDefaultStyle: true },
      });
      views.set(element, result.view);
    } catch (error) {
      element.textContent = `This chart could not be drawn (${error}); its figures are in the tables.`;
      element.classList.add("chart-error");
    }
    element.dataset.drawn = String(rows.length);
  };
  const visible = (element) => !element.closest("details:not([open])");
  const drawAll = () => Promise.all([...document.querySelectorAll(".chart")].filter(visible).map(draw));
  document.addEventListener("toggle", drawAll, true);
  drawAll();

  for (const choice of document.querySelectorAll("fieldset.choice")) {
    choice.hidden = false;
    choice.addEventListener("change", (event) => {
      for (const view of views.values()) {
        if (view && choice.dataset.signal in view.getState().signals) {
          view.signal(choice.dataset.signal, event.target.value).runAsync();
        }
      }
    });
  }

  // A link to a kernel opens it.
  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) {
      target.open = true;
      target.scrollIntoView();
    }
  };
  window.addEventListener("hashchange", reveal);
  reveal();
})();
