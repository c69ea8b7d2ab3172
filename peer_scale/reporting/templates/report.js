"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const types = { f4: Float32Array, f8: Float64Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i1: Int8Array, i2: Int16Array, i4: Int32Array };
  const axisTitles = { step: "step", tokens: "tokens", train_flops: "FLOPs, the paper's accounting", time_s: "time of training" };
  const dashes = { solid: "", dash: "9 6", dot: "3 4", dashdot: "9 4 3 4", longdash: "14 6", longdashdot: "14 4 3 4" };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)");
  const hidden = new Set();
  const element = (number) => document.getElementById(`figure-${number}`);

  /* numpy arrays come as base64; what plotly is not given, the page reads itself */
  function numbers(value) {
    if (!value || value.bdata === undefined) return value || [];
    const bytes = Uint8Array.from(atob(value.bdata), (character) => character.charCodeAt(0));
    return new types[value.dtype](bytes.buffer);
  }
  const tables = data.tables.map((table) => Object.fromEntries(Object.entries(table).map(([axis, values]) => [axis, numbers(values)])));
  for (const figure of data.figures) {
    for (const trace of figure.data) {
      if (trace.meta && trace.meta.at !== undefined) trace.meta.at = numbers(trace.meta.at);
      if (figure.kind === "curve") trace.y = numbers(trace.y);
    }
  }
  const curves = data.figures.map((figure, number) => number).filter((number) => data.figures[number].kind === "curve");

  /* the x axis: what, in which unit, on which scale */
  const chosen = () => ({
    axis: (document.querySelector("input[name=axis]:checked") || { value: "step" }).value,
    log: document.getElementById("log").checked,
    smooth: document.getElementById("smooth").checked,
  });
  const longest = Math.max(0, ...tables.map((table) => (table.time_s ? table.time_s[table.time_s.length - 1] : 0)));
  const [unit, seconds] = longest > 2 * 86400 ? ["days", 86400] : longest > 2 * 3600 ? ["hours", 3600] : longest > 180 ? ["minutes", 60] : ["seconds", 1];
  function xs(trace, axis) {
    const column = tables[trace.meta.table][axis];
    if (!column) return new Float64Array(trace.meta.at.length).fill(NaN);
    return Float64Array.from(trace.meta.at, (row) => (axis === "time_s" ? column[row] / seconds : column[row]));
  }
  /* one stretch for all figures, so that what stands below each other is the same step */
  function range(axis, log) {
    const columns = tables.map((table) => table[axis]).filter(Boolean);
    let [low, high] = [Infinity, -Infinity];
    for (const column of columns) {
      for (const value of column) {
        if (value < low && (value > 0 || !log)) low = value;
        if (value > high) high = value;
      }
    }
    if (axis === "time_s") [low, high] = [low / seconds, high / seconds];
    if (!(low < high)) return null;
    if (log) [low, high] = [Math.log10(low), Math.log10(high)];
    return [low - 0.02 * (high - low), high + 0.02 * (high - low)];
  }
  const axisTitle = (axis) => axisTitles[axis] + (axis === "time_s" ? `, ${unit}` : "");

  function colours() {
    const style = getComputedStyle(document.documentElement);
    return Object.fromEntries(["paper", "ink", "dim", "line", "grid"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }
  function themed() {
    const colour = colours();
    const change = { "font.color": colour.dim, "hoverlabel.bgcolor": colour.paper, "hoverlabel.bordercolor": colour.line, "hoverlabel.font.color": colour.ink };
    for (const axis of ["xaxis", "yaxis"]) {
      change[`${axis}.gridcolor`] = colour.grid;
      change[`${axis}.linecolor`] = colour.line;
      change[`${axis}.zerolinecolor`] = colour.line;
      change[`${axis}.spikecolor`] = colour.dim;
    }
    return change;
  }
  function layoutOf(figure) {
    const own = figure.layout;
    const x = { automargin: true, showline: true, zeroline: false, fixedrange: touch.matches, ...own.xaxis };
    const y = { automargin: true, zeroline: false, nticks: 6, fixedrange: touch.matches, ...own.yaxis };
    const layout = {
      ...own, autosize: true, showlegend: false, modebar: { bgcolor: "rgba(0,0,0,0)" }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12 }, hoverlabel: { font: { size: 12 } },
      margin: { l: 44, r: 14, t: 12, b: 40 }, dragmode: touch.matches ? false : "zoom", xaxis: x, yaxis: y,
    };
    delete layout.height;
    if (figure.kind === "curve") {
      const { axis, log } = chosen();
      layout.hovermode = touch.matches ? "closest" : "x unified";
      const fixed = range(axis, log);
      if (fixed) x.range = fixed;
      Object.assign(x, { title: { text: axisTitle(axis), standoff: 6, font: { size: 11 } }, type: log ? "log" : "linear", showspikes: true, spikemode: "across", spikethickness: 1, spikedash: "dot", spikesnap: "cursor", nticks: 6, tickformat: "~s", hoverformat: ",.4~g" });
    }
    for (const [key, value] of Object.entries(themed())) {
      const path = key.split(".");
      let inner = layout;
      for (const step of path.slice(0, -1)) inner = inner[step] = { ...inner[step] };
      inner[path[path.length - 1]] = value;
    }
    return layout;
  }
  function visible(trace) {
    if (hidden.has(trace.meta && trace.meta.arm)) return false;
    return chosen().smooth || (trace.meta && trace.meta.role) !== "smooth";
  }
  function opacity(trace) {
    return (trace.meta && trace.meta.role) === "raw" && !chosen().smooth ? 1 : trace.opacity === undefined ? 1 : trace.opacity;
  }
  function hover(trace) {
    return (trace.meta && trace.meta.role) === "raw" && !chosen().smooth ? "all" : trace.hoverinfo || "all";
  }

  function draw(number) {
    const figure = data.figures[number];
    const traces = figure.data.map((trace) => {
      const drawn = { ...trace, visible: visible(trace), opacity: opacity(trace) };
      if (figure.kind === "curve") drawn.x = xs(trace, chosen().axis);
      return drawn;
    });
    const config = { responsive: true, displaylogo: false, displayModeBar: touch.matches ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"], toImageButtonOptions: { format: "svg", filename: figure.title } };
    return Plotly.newPlot(element(number), traces, layoutOf(figure), config);
  }
  function changeAxis() {
    const { axis, log } = chosen();
    const fixed = range(axis, log);
    const stretch = fixed ? { "xaxis.range": fixed, "xaxis.autorange": false } : { "xaxis.autorange": true };
    following = true;
    for (const number of curves) {
      const figure = data.figures[number];
      Plotly.update(element(number), { x: figure.data.map((trace) => xs(trace, axis)) }, { "xaxis.title.text": axisTitle(axis), "xaxis.type": log ? "log" : "linear", ...stretch });
    }
    following = false;
  }
  function changeTraces() {
    data.figures.forEach((figure, number) => {
      Plotly.restyle(element(number), { visible: figure.data.map(visible), opacity: figure.data.map(opacity), hoverinfo: figure.data.map(hover) });
    });
  }
  /* a stretch that is chosen in one figure is shown in all that are drawn over the same axis */
  function follow(number) {
    element(number).on("plotly_relayout", (change) => {
      const range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      const reset = change["xaxis.autorange"] === true && Object.keys(change).every((key) => key.includes("axis.autorange") || key.includes("axis.showspikes"));
      if (following || (range[0] === undefined && !reset)) return;
      following = true;
      const wanted = reset ? { "xaxis.autorange": true } : { "xaxis.range": range };
      Promise.all(curves.filter((other) => other !== number).map((other) => Plotly.relayout(element(other), wanted))).finally(() => { following = false; });
    });
  }
  let following = false;

  /* CSV */
  const quoted = (cell) => {
    const text = String(cell);
    const inert = /^[=+@\t\r-]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text; /* no formula to a spreadsheet */
    return /[",\n\r]/.test(inert) ? `"${inert.replaceAll('"', '""')}"` : inert;
  };
  function save(name, rows) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n"], { type: "text/csv" }));
    link.download = `${name}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  function curveRows() {
    const axes = ["step", "tokens", "train_flops", "time_s"];
    const rows = [["figure", "arm", "curve", "name", ...axes, "value"]];
    for (const number of curves) {
      for (const trace of data.figures[number].data) {
        const table = tables[trace.meta.table];
        trace.meta.at.forEach((row, place) => {
          if (Number.isNaN(trace.y[place])) return;
          const at = axes.map((axis) => (table[axis] ? Number(table[axis][row].toPrecision(7)) : ""));
          rows.push([data.figures[number].title, data.arms[trace.meta.arm], trace.meta.role, trace.name || "", ...at, Number(trace.y[place].toPrecision(7))]);
        });
      }
    }
    return rows;
  }
  document.querySelectorAll("[data-csv]").forEach((button) => button.addEventListener("click", () => {
    const table = document.querySelector(`table[data-name="${button.dataset.csv}"]`);
    save(button.dataset.csv, [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim())));
  }));

  function explain() {
    const roles = new Set(curves.flatMap((number) => data.figures[number].data.map((trace) => trace.meta.role)));
    const told = [];
    if (roles.has("smooth")) told.push("Faint: single steps, the lowest and highest of each stretch kept. Bold: the mean of a twentieth of the run around each step.");
    if (roles.has("mean")) told.push("Faint: seeds, smoothed. Bold: their mean, over the steps that all have done.");
    if (roles.has("held out")) told.push("◆ held-out text.");
    if (roles.has("restart")) told.push("▲ started again; no line goes across.");
    if (roles.has("skipped")) told.push("✕ step skipped, its gradients overflowed.");
    document.getElementById("key").textContent = told.join(" ");
    document.getElementById("smooth-label").hidden = !roles.has("smooth");
  }

  async function start() {
    if (!data.figures.length) return;
    explain();
    document.querySelectorAll("[data-dash]").forEach((line) => line.setAttribute("stroke-dasharray", dashes[line.dataset.dash]));
    for (let number = 0; number < data.figures.length; number += 1) {
      await draw(number);
      if (data.figures[number].kind === "curve") follow(number);
      if (number % 3 === 2) await new Promise((done) => setTimeout(done));
    }
    document.querySelectorAll("input[name=axis], #log").forEach((input) => input.addEventListener("change", changeAxis));
    document.getElementById("smooth").addEventListener("change", changeTraces);
    document.getElementById("curves-csv").addEventListener("click", () => save("curves", curveRows()));
    document.querySelectorAll(".arm").forEach((button) => button.addEventListener("click", () => {
      const arm = Number(button.dataset.arm);
      if (!hidden.delete(arm)) hidden.add(arm);
      button.setAttribute("aria-pressed", String(!hidden.has(arm)));
      changeTraces();
    }));
    dark.addEventListener("change", () => data.figures.forEach((_, number) => Plotly.relayout(element(number), themed())));
  }
  start().then(() => { document.documentElement.dataset.drawn = "yes"; });
})();
