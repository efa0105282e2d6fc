"use strict";
// The page's own script: choices, tooltips, walking points, sorting and filtering. Data reach the page as text only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("controls");
  const tip = document.getElementById("tip");
  const choices = () => (form ? Object.fromEntries(new FormData(form)) : {});

  const fits = (row, chosen) =>
    Object.entries(chosen).every(([name, value]) => row[name] === undefined || row[name] === null || row[name] === value);

  function told(pairs) {
    const list = document.createElement("dl");
    for (const [label, text] of pairs) {
      for (const [tag, words] of [["dt", label], ["dd", text]]) {
        list.appendChild(document.createElement(tag)).textContent = words;
      }
    }
    return list;
  }

  function showTip(_handler, event, _item, value) {
    if (!value || !value.tip) {
      tip.hidden = true;
      return;
    }
    tip.replaceChildren(told(value.tip));
    tip.hidden = false;
    const edge = 12;
    const left = event.clientX + edge + tip.offsetWidth < innerWidth ? event.clientX + edge : event.clientX - edge - tip.offsetWidth;
    const top = event.clientY + edge + tip.offsetHeight < innerHeight ? event.clientY + edge : event.clientY - edge - tip.offsetHeight;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  }

  class Chart {
    constructor(figure, given) {
      Object.assign(this, given, { figure, shown: [] });
      this.walk = figure.querySelector("input");
      this.output = figure.querySelector("output");
      for (const kind of ["input", "focus"]) this.walk.addEventListener(kind, () => this.choose());
    }

    async draw() {
      const chosen = choices();
      const params = this.spec.params.map((one) => ({ ...one, value: chosen[one.name.slice(3)] ?? one.value }));
      const spec = { ...this.spec, params, datasets: { rows: this.rows, ...this.more } };
      const made = await vegaEmbed(this.figure.querySelector(".canvas"), spec, {
        ast: true, actions: false, renderer: "svg", tooltip: showTip, mode: "vega-lite",
      });
      this.view = made.view;
      await this.follow(choices()); // they may have changed meanwhile
    }

    async follow(chosen) {
      if (!this.view) return; // it is still being drawn, and asks for itself
      for (const param of this.spec.params) {
        const name = param.name.slice(3);
        if (param.name.startsWith("by_") && name in chosen) this.view.signal(param.name, chosen[name]);
      }
      this.shown = this.rows.filter((row) => fits(row, chosen));
      this.figure.querySelector(".unit").textContent = this.shown.length ? this.shown[0].unit : "nothing to show";
      this.walk.max = Math.max(0, this.shown.length - 1);
      this.walk.value = 0;
      this.view.signal("chosen", -1);
      this.output.replaceChildren();
      this.walk.setAttribute("aria-valuetext", this.shown.length ? "no point chosen yet" : "no points");
      await this.view.runAsync();
      this.figure.dataset.drawn = JSON.stringify(chosen);
    }

    choose() {
      const row = this.shown[Number(this.walk.value)];
      if (!row) return;
      this.view.signal("chosen", row.at).runAsync();
      this.output.replaceChildren(told(row.tip));
      this.walk.setAttribute("aria-valuetext", row.name);
    }
  }

  const comparisons = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b };

  function matcher(text) {
    const found = /^\s*(<=|>=|<|>|=)\s*([-+−]?[\d.]+(?:e[-+]?\d+)?)\s*$/i.exec(text);
    if (!found) {
      const wanted = text.toLowerCase();
      return (cell) => cell.textContent.toLowerCase().includes(wanted);
    }
    const limit = Number(found[2].replace("−", "-"));
    return (cell) => {
      const number = cell.dataset.order || "";
      return number !== "" && comparisons[found[1]](Number(number), limit);
    };
  }

  class Table {
    constructor(table, number) {
      this.filters = new Map();
      const heads = [...table.tHead.rows[0].cells];
      const rows = table.tBodies[0].rows.length;
      const long = rows > 10;
      this.columns = heads.map((head) => ({ control: head.dataset.control, value: head.dataset.value }));
      if (long) this.fields(table, heads);
      if (table.tFoot) table.tFoot.remove();
      table.id = table.id || `table${number}`;
      this.table = table;
      const search = { search: { text: "Search this table " } };
      this.made = new DataTable(table, {
        order: [], autoWidth: false, titleRow: 0, paging: rows > 25, pageLength: 25, info: long,
        lengthMenu: [10, 25, 100, { label: "all", value: -1 }],
        layout: { topStart: long ? search : null, topEnd: rows > 25 ? "pageLength" : null, bottomStart: long ? "info" : null, bottomEnd: rows > 25 ? "paging" : null },
        language: { lengthMenu: "_MENU_ rows a page", info: "_START_ to _END_ of _TOTAL_", infoEmpty: "no rows", infoFiltered: "(of _MAX_)", emptyTable: "no rows", zeroRecords: "no row fits" },
      });
      this.chosen = {};
      this.made.search.fixed("choices", (_text, _data, at) => this.keeps(this.made.row(at).node()));
    }

    fields(table, heads) {
      const line = table.tHead.insertRow();
      line.className = "fields";
      heads.forEach((head, i) => {
        const cell = line.appendChild(document.createElement("td"));
        const field = cell.appendChild(document.createElement("input"));
        field.type = "search";
        field.name = `filter ${i}`;
        field.setAttribute("aria-label", `filter ${head.textContent}`);
        field.title = head.classList.contains("n") ? "text, or a comparison such as > 0.5" : "text";
        field.placeholder = head.classList.contains("n") ? "> 0" : "filter";
        field.addEventListener("input", () => {
          if (field.value.trim()) this.filters.set(i, matcher(field.value));
          else this.filters.delete(i);
          this.made.draw();
        });
      });
    }

    keeps(row) {
      if (!row) return true;
      if (!fits(row.dataset, this.chosen)) return false;
      for (const [i, test] of this.filters) if (!test(row.ownCells[i])) return false;
      return true;
    }

    follow(chosen) {
      this.chosen = chosen;
      this.made.rows().every(function () {
        const row = this.node();
        row.ownCells = row.ownCells || [...row.cells];
      });
      this.columns.forEach(({ control, value }, i) => {
        if (control && control in chosen) this.made.column(i).visible(chosen[control] === value);
      });
      this.made.draw();
    }
  }

  const charts = data.charts.map((given, i) => new Chart(document.getElementById(`chart${i}`), given));
  const tables = [...document.querySelectorAll("details .wide > table")]
    .filter((table) => table.tBodies[0].rows.length > 1)
    .map((table, i) => new Table(table, i));

  async function follow() {
    const chosen = choices();
    tables.forEach((one) => one.follow(chosen));
    await Promise.all(charts.map((one) => one.follow(chosen)));
    document.documentElement.dataset.shown = JSON.stringify(chosen);
  }

  async function begin() {
    if (form) {
      form.hidden = false;
      form.addEventListener("change", follow);
      form.addEventListener("submit", (event) => event.preventDefault());
    }
    addEventListener("keydown", (event) => {
      if (event.key === "Escape") tip.hidden = true;
    });
    tables.forEach((one) => one.follow(choices()));
    for (const one of charts) one.figure.hidden = false;
    for (const one of charts) await one.draw();
    document.documentElement.dataset.ready = "yes";
  }

  begin();
})();
