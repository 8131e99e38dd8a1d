"use strict";
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // The table: sorting and filtering ----------------------------------------------------------
  const body = byId("table").tBodies[0];
  const heads = all("th", byId("table"));
  const names = heads.map((head) => head.dataset.name);
  const scales = heads.map((head) => Number(head.dataset.scale));
  // The number with all digits, or the text if the cell has no more digits. Cells are read on demand,
  // because reading a thousand rows takes half a second.
  const valueOf = (entry, column) =>
    entry.cells[column].getAttribute("data-v") ?? textOf(entry, column);
  const textOf = (entry, column) => entry.cells[column].textContent;
  const allOf = (entry) => {
    entry.all ??= names.map((_, column) => `${textOf(entry, column)} ${valueOf(entry, column)}`)
      .join(" ").toLowerCase();
    return entry.all;
  };
  let entries = [...body.rows].map((row) => ({ row, cells: row.cells }));
  body.addEventListener("pointerover", ({ target }) => {
    if (target.dataset.v && !target.title) target.title = target.dataset.v;
  });

  const isNumber = (text) => text !== "" && text !== "-" && Number.isFinite(Number(text));
  const words = new Intl.Collator("en", { numeric: true });
  const compare = (a, b) => {
    if (a.number !== null && b.number !== null) return a.number - b.number;
    if ((a.number === null) !== (b.number === null)) return a.number === null ? 1 : -1;
    return words.compare(a.text, b.text);
  };
  const sortBy = (column) => {
    const head = heads[column];
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const keyed = entries.map((entry) => {
      const text = valueOf(entry, column);
      return { entry, text, absent: text === "" || text === "-",
        number: isNumber(text) ? Number(text) : null };
    });
    // Undefined values come last in both directions.
    keyed.sort((a, b) => (a.absent || b.absent ? a.absent - b.absent : sign * compare(a, b)));
    entries = keyed.map(({ entry }) => entry);
    body.append(...entries.map(({ row }) => row));
  };
  heads.forEach((head, column) =>
    head.querySelector("button").addEventListener("click", () => sortBy(column)));

  const checks = { "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b,
    ">=": (a, b) => a >= b };
  const termOf = (word) => {
    const parts = /^([^<>=]+)(<=|>=|<|>|=)(.+)$/.exec(word);
    const column = parts
      ? names.findIndex((name) => name === parts[1] || name.endsWith("." + parts[1])) : -1;
    if (column < 0) return (entry) => allOf(entry).includes(word);
    if (!isNumber(parts[3]))
      return (entry) => parts[2] === "=" && textOf(entry, column).toLowerCase() === parts[3];
    // Compare with the rounded number, because users type what the table shows.
    if (parts[2] === "=")
      return (entry) => isNumber(textOf(entry, column))
        && Number(textOf(entry, column)) === Number(parts[3]);
    return (entry) => isNumber(valueOf(entry, column))
      && checks[parts[2]](Number(valueOf(entry, column)) * scales[column], Number(parts[3]));
  };
  const form = byId("filters");
  const marks = names.indexOf("marks");
  const filter = () => {
    const terms = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean).map(termOf);
    for (const select of all("select", form)) {
      if (select.value !== "") {
        const column = Number(select.dataset.column);
        terms.push((entry) => textOf(entry, column) === select.value);
      }
    }
    if (byId("only-marked").checked) terms.push((entry) => valueOf(entry, marks) !== "");
    let shown = 0;
    for (const entry of entries) {
      entry.row.hidden = !terms.every((term) => term(entry));
      shown += entry.row.hidden ? 0 : 1;
    }
    byId("count").textContent = `${shown} of ${entries.length} cells`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());

  // Clear the filters if they hide the row that a link goes to.
  const show = (hash) => {
    const row = hash.startsWith("#cell-") ? byId(hash.slice(1)) : null;
    if (!row?.hidden) return null;
    form.reset();
    filter();
    return row;
  };
  // On click, because a second link to the same row does not change the hash.
  document.addEventListener("click", ({ target }) => show(target.closest("a")?.hash ?? ""));
  addEventListener("hashchange", () => show(location.hash)?.scrollIntoView());

  root.dataset.table = String(Math.round(performance.now()));

  // The theme -----------------------------------------------------------------------------------
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";
  const drawn = new Set();
  const colors = () => {
    const style = getComputedStyle(root);
    const [fg, line, card] = ["--fg", "--line", "--card"].map((n) => style.getPropertyValue(n).trim());
    const look = { paper_bgcolor: card, plot_bgcolor: card, "font.color": fg,
      "hoverlabel.bgcolor": card, "hoverlabel.bordercolor": line, "hoverlabel.font.color": fg };
    for (const axis of ["xaxis", "yaxis"]) {
      look[`${axis}.gridcolor`] = line;
      look[`${axis}.linecolor`] = line;
      look[`${axis}.zerolinecolor`] = line;
    }
    return look;
  };
  const themed = () => {
    byId("theme").textContent = isDark() ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", isDark() ? "Use light colors" : "Use dark colors");
    for (const plot of drawn) window.Plotly.relayout(plot, colors());
  };
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    themed();
  });
  prefersDark.addEventListener("change", themed);
  themed();

  // The charts: drawn when they come into view --------------------------------------------------
  const figures = JSON.parse(byId("figures").textContent);
  const hidden = new Set();
  const nested = (flat) => {
    const deep = {};
    for (const [path, value] of Object.entries(flat)) {
      const keys = path.split(".");
      let at = deep;
      for (const key of keys.slice(0, -1)) at = at[key] ??= {};
      at[keys.at(-1)] = value;
    }
    return deep;
  };
  const layoutOf = (own) => {
    const layout = nested(colors());
    const font = { size: 12, family: getComputedStyle(document.body).fontFamily };
    Object.assign(layout, own, { showlegend: false, dragmode: "zoom",
      margin: { l: own.yaxis.title.text ? 68 : 48, r: 14, t: 12, b: 44 }, font: { ...layout.font, ...font } });
    const look = nested(colors());
    for (const axis of ["xaxis", "yaxis"])
      layout[axis] = { ...look[axis], ...own[axis], title: { standoff: 6, ...own[axis].title } };
    return layout;
  };
  const seriesKey = (chart, label) => `${chart} ${label}`;
  const labelOf = (trace) => {
    const text = document.createElement("textarea");
    text.innerHTML = trace.legendgroup || "";
    return text.value;
  };
  const draw = (plot) => {
    const { chart, panel } = plot.dataset;
    const { data, layout } = figures[chart][Number(panel)];
    for (const trace of data)
      if (hidden.has(seriesKey(chart, labelOf(trace)))) trace.visible = false;
    drawn.add(plot);
    return window.Plotly.newPlot(plot, data, layoutOf(layout), {
      // The buttons of the bar would add seven tab stops to every chart.
      displayModeBar: false, responsive: true });
  };
  // Report a chart that fails and draw the others.
  const attempt = async (plot) => {
    try {
      await draw(plot);
    } catch (error) {
      drawn.delete(plot);
      trouble(`A chart cannot be drawn: ${error.message}`);
    }
  };
  for (const button of all(".legend button")) {
    button.addEventListener("click", () => {
      const { chart, series } = button.dataset;
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      hidden[shown ? "delete" : "add"](seriesKey(chart, series));
      for (const plot of drawn) {
        if (plot.dataset.chart !== chart) continue;
        const { data } = figures[chart][Number(plot.dataset.panel)];
        const which = data.map((trace, i) => (labelOf(trace) === series ? i : -1));
        const indices = which.filter((i) => i >= 0);
        if (indices.length) window.Plotly.restyle(plot, { visible: shown }, indices);
      }
    });
  }

  const trouble = (text) => {
    byId("trouble").textContent = text;
    byId("trouble").hidden = false;
  };
  const unpack = async () => {
    const packed = atob(byId("plotly").textContent);
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i += 1) bytes[i] = packed.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };
  const start = async () => {
    const plots = all(".plot");
    if (plots.length) {
      if (!("DecompressionStream" in window)) {
        trouble("This browser cannot unpack the charts (it lacks DecompressionStream); use a newer one. The table works.");
        return;
      }
      await unpack();
      // Draw one chart at a time, so that the page responds between two.
      const queue = [];
      let busy = false;
      const next = async () => {
        const plot = queue.shift();
        if (!drawn.has(plot)) await attempt(plot);
        busy = queue.length > 0;
        if (busy) setTimeout(next);
      };
      const watch = new IntersectionObserver((seen) => {
        for (const { isIntersecting, target } of seen) {
          if (!isIntersecting) continue;
          watch.unobserve(target);
          queue.push(target);
        }
        if (!busy && queue.length) {
          busy = true;
          setTimeout(next);
        }
      }, { rootMargin: "200px" });
      for (const plot of plots) watch.observe(plot);
      window.addEventListener("beforeprint", () => {
        for (const plot of plots) if (!drawn.has(plot)) attempt(plot);
      });
    }
    root.dataset.ready = String(Math.round(performance.now()));
  };
  start().catch((error) => trouble(`The charts cannot be drawn: ${error.message}`));
})();
