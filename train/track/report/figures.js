// Each figure as traces and a layout for plotly: functions of what is chosen on the page, which draw nothing.

const FONT = { size: 13,
  family: 'system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif' }; // as report.css
const SHARE = { colorscale: "YlGnBu", reversescale: true }; // pale is none, dark is all
const SIGNED = { zmin: -1, zmax: 1, colorscale: [[0, "#b2182b"], [0.25, "#ef8a62"], [0.5, "#ffffff"],
  [0.75, "#67a9cf"], [1, "#2166ac"]] }; // red is less than nothing, blue is more
const UNKNOWN_CELL = "#d9d9d9"; // what shows where a matrix has no number

const NUMBERS = {
  effective_experts: "experts a task uses<br>in effect",
  between_tasks: "told apart (0–1)",
  drift: "moved since<br>the start (0–1)",
  over_uniform: "weight away from<br>equal shares (0–1)",
  entropy: "entropy (nats)",
  dead_experts: "dead experts",
};

function base(height, extra) {
  return {
    height,
    font: FONT,
    margin: { l: 60, r: 20, t: 20, b: 55 },
    plot_bgcolor: "#fff",
    paper_bgcolor: "#fff",
    hoverlabel: { align: "left", namelength: -1 },
    ...extra,
  };
}

function bar(title) {
  return { title: { text: title, side: "right" }, thickness: 14, outlinewidth: 0 };
}

function tall(rows) {
  return Math.max(340, Math.min(920, 110 + 22 * rows));
}

// A category axis of tasks, first on top.
function taskAxis(labels) {
  return { type: "category", categoryorder: "array", categoryarray: labels, autorange: "reversed",
    automargin: true, ticks: "", showgrid: false };
}

function numbersInside(rows, columns) {
  return rows * columns <= 260 && columns <= 16 ? { texttemplate: "%{z:.2f}" } : {};
}

function gates(state) {
  const { layer, head, view } = state;
  const order = orders[state.order][1]();
  const labels = order.map(taskLabel);
  const E = groups[layer].experts;
  const signed = view === "change";
  const what = signed ? "change" : "share";
  const scale = signed ? SIGNED : { ...SHARE, zmin: 0, zmax: data.routing.largest };
  const trace = {
    type: "heatmap", y: labels, x: Array.from({ length: E }, (_, e) => e),
    z: rowsOf(layer, view, head, order),
    ...scale, ...numbersInside(T, E), hoverongaps: false, xgap: E <= 32 ? 1 : 0, ygap: T <= 60 ? 1 : 0,
    colorbar: bar(signed ? "change of the share since the start" : "share of the task's gate weight"),
    hovertemplate: `%{y}<br>expert %{x}<br>${what} %{z:.3f}<extra></extra>`,
  };
  const xaxis = { title: { text: "expert" }, tickformat: "d", dtick: E <= 32 ? 1 : undefined, showgrid: false,
    zeroline: false };
  const look = { xaxis, yaxis: taskAxis(labels), plot_bgcolor: UNKNOWN_CELL };
  return { traces: [trace], layout: base(tall(T), look) };
}

function layers() {
  const labels = groups.map((group) => escaped(group.label));
  const shown = Object.keys(NUMBERS).filter((key) => groups.some((g) => g.numbers[key] !== undefined));
  const traces = [];
  const rows = Math.ceil(shown.length / 2);
  const layout = { showlegend: false, margin: { l: 80, r: 20, t: 20, b: 70 },
    grid: { rows, columns: 2, pattern: "independent", ygap: 0.14, xgap: 0.16 } };
  const most = Math.max(...groups.map((group) => group.of_heads.length));
  shown.forEach((key, i) => {
    const n = i ? i + 1 : "";
    const line = (name, values, look) => ({
      type: "scatter", mode: "lines+markers", name, x: labels, y: values, xaxis: `x${n}`, yaxis: `y${n}`,
      hovertemplate: `layer %{x}${name && `, ${name}`}: %{y:.3f}<extra></extra>`, ...look,
    });
    for (let h = 0; h < most; h++) {
      const values = groups.map((group) => (group.of_heads[h] ? group.of_heads[h][key] : null));
      traces.push(line(`head ${h}`, values, { line: { width: 1, color: "#9db8d0" }, marker: { size: 3 } }));
    }
    const whole = groups.map((group) => group.numbers[key]);
    traces.push(line(most ? "all heads" : "", whole, { line: { color: INKS[0] }, marker: { size: 6 } }));
    layout[`xaxis${n}`] = { type: "category", nticks: 26, automargin: true, matches: i ? "x" : undefined,
      tickangle: groups.length > 6 ? -45 : 0, showticklabels: i >= shown.length - 2 };
    const unit = NUMBERS[key].endsWith("(0–1)");
    layout[`yaxis${n}`] = { title: { text: NUMBERS[key] }, rangemode: "tozero", automargin: true,
      ...(unit ? { range: [0, 1.03] } : {}) };
  });
  return { traces, layout: base(170 * rows + 130, layout) };
}

// Lines over steps, in panels one above the other: [[title, {key: name}, settings of the axis], ...].
function overSteps(series, panels) {
  const drawn = panels.filter(([, keys]) => Object.keys(keys).some((key) => series[key]));
  const traces = [];
  const layout = { grid: { rows: drawn.length, columns: 1, pattern: "coupled", ygap: 0.12 },
    xaxis: { title: { text: "optimiser step" }, zeroline: false },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom" } };
  drawn.forEach(([title, keys, axis], i) => {
    const n = i ? i + 1 : "";
    Object.entries(keys).filter(([key]) => series[key]).forEach(([key, name]) => {
      const few = series.steps.length < 60;
      traces.push({ type: "scatter", mode: few ? "lines+markers" : "lines", name, x: series.steps,
        y: series[key], yaxis: `y${n}`, line: { color: INKS[traces.length] }, marker: { size: 4 },
        hovertemplate: `step %{x}<br>${name}: %{y:.3f}<extra></extra>` });
    });
    layout[`yaxis${n}`] = { title: { text: title }, automargin: true, ...axis };
  });
  return { traces, layout: base(180 * drawn.length + 150, layout) };
}

function history() {
  const named = { "routing/between_tasks": "told apart", "routing/over_uniform": "away from equal shares",
    "routing/drift": "moved since the start", "routing/dead_expert_frac": "dead experts" };
  return overSteps(data.histories.routing, [
    ["experts in effect", { "routing/effective_experts": "experts a task uses in effect" },
      { rangemode: "tozero" }],
    ["share (0–1)", named, { range: [0, 1.03] }],
  ]);
}

function conflictHistory() {
  return overSteps(data.histories.conflict, [
    ["share (0–1)", { "grad/conflict_frac": "pairs that oppose each other",
      "grad/update_change": "what surgery changes of the update" }, { rangemode: "tozero" }],
    ["mean cosine (−1–1)", { "grad/cosine": "cosine of two tasks",
      "grad/same_task_cosine": "cosine of two halves of one task" }, {}],
  ]);
}

// A square of pairs: the packed matrix is R x R, drawn in the given order.
function pairs(matrix, labels, order, look, title, word) {
  const R = order.length;
  const names = order.map((i) => labels[i]);
  const z = order.map((i) => Float32Array.from(order, (j) => matrix[i * R + j]));
  return {
    traces: [{ type: "heatmap", x: names, y: names, z, ...look, ...numbersInside(R, R), hoverongaps: false,
      colorbar: bar(title), hovertemplate: `%{y}<br>%{x}<br>${word} %{z:.2f}<extra></extra>` }],
    layout: base(tall(R), { yaxis: taskAxis(names), plot_bgcolor: UNKNOWN_CELL,
      xaxis: { ...taskAxis(names), autorange: true, showticklabels: false,
        title: { text: "the same tasks, in the same order" } } }),
  };
}

function similarity() {
  const matrix = once("similarity", () => unpackBytes(data.similarity, 0, 1));
  const figure = pairs(matrix, data.tasks.label.map((_, t) => taskLabel(t)), data.order,
    { ...SHARE, zmin: 0, zmax: 1 }, "cosine of shares", "cosine");
  const tree = { type: "scatter", mode: "lines", x: data.tree.height, y: data.tree.place, xaxis: "x2",
    yaxis: "y2", line: { color: "#55626f", width: T > 200 ? 0.7 : 1.3 }, showlegend: false,
    hovertemplate: "joined at 1 − cosine = %{x:.2f}<extra></extra>" };
  figure.traces[0].colorbar.x = 1.01;
  figure.traces.push(tree);
  figure.layout.xaxis.domain = [0, 0.74];
  figure.layout.xaxis2 = { domain: [0.76, 1], title: { text: "joined at 1 − cosine" }, anchor: "y2",
    zeroline: false, range: [0, 1.05 * Math.max(0.01, ...data.tree.height)] };
  figure.layout.yaxis2 = { range: [T - 0.5, -0.5], showticklabels: false, showgrid: false, zeroline: false,
    anchor: "x2", fixedrange: true };
  figure.layout.shapes = [{ type: "rect", xref: "x2 domain", yref: "y2 domain", x0: 0, x1: 1, y0: 0, y1: 1,
    fillcolor: "#fff", line: { width: 0 }, layer: "below" }];
  return figure;
}

function map() {
  const kinds = named.length ? [...named, null].filter((g) => data.tasks.group.includes(g)) : [null];
  const traces = kinds.map((group) => {
    const tasks = data.order.filter((t) => data.tasks.group[t] === group && data.map[t][0] !== null);
    return { type: "scatter", mode: T <= 40 ? "markers+text" : "markers", name: group === null ? "no group" :
      escaped(group), x: tasks.map((t) => data.map[t][0]), y: tasks.map((t) => data.map[t][1]),
      text: tasks.map((t) => escaped(data.tasks.label[t])),
      textposition: tasks.map((_, i) => ["top center", "bottom center", "middle right"][i % 3]),
      textfont: { size: 11 }, marker: { size: T <= 200 ? 10 : 6, color: inkOf(group), symbol: symbolOf(group),
        opacity: 0.8 }, hovertemplate: "%{text}<extra>%{fullData.name}</extra>" };
  });
  const axis = { showticklabels: false, zeroline: false, ticks: "" };
  const legend = { title: { text: "given group" } };
  return { traces, layout: base(600, { showlegend: named.length > 0, legend, xaxis: axis,
    yaxis: { ...axis, scaleanchor: "x" } }) };
}

function conflict() {
  const { labels, tasks, cosines } = data.conflict;
  const matrix = once("conflict", () => unpackBytes(cosines, -1, 1));
  const rows = labels.map((_, i) => i);
  const place = new Map(data.order.map((task, i) => [task, i]));
  if (tasks) rows.sort((a, b) => place.get(tasks[a]) - place.get(tasks[b]));
  const names = labels.map((label, i) => (tasks ? taskLabel(tasks[i]) : escaped(label)));
  return pairs(matrix, names, rows, SIGNED, "cosine of gradients", "cosine");
}

function curves(state) {
  const { steps, whole, title, unit } = data.curves[state.family];
  const values = familyValues(state.family);
  const mode = steps.length < 60 ? "lines+markers" : "lines";
  const traces = [...state.picked].map((task, i) => ({
    type: "scatter", mode, name: escaped(data.tasks.label[task]), x: steps,
    y: steps.map((_, p) => values[p * T + task]), connectgaps: true, line: { color: INKS[i % INKS.length],
      dash: ["solid", "dot", "dashdot"][Math.floor(i / INKS.length) % 3] }, marker: { size: 4 },
    hovertemplate: "step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
  }));
  if (whole && whole.some((value) => value !== null)) {
    traces.push({ type: "scatter", mode: "lines", name: "all tasks", x: steps, y: whole,
      line: { color: "#1c2733", dash: "dash" },
      hovertemplate: "step %{x}: %{y:.4g}<extra>all tasks</extra>" });
  }
  const yaxis = { title: { text: `${title} (${unit})` }, automargin: true,
    ...(state.family === "metric" ? { range: [-0.02, 1.02] } : {}) };
  const xaxis = { title: { text: "optimiser step" }, zeroline: false };
  return { traces, layout: base(460, { xaxis, yaxis, showlegend: true }) };
}

function familyValues(family) {
  return once(`curves ${family}`, () => unpackFloats(data.curves[family].values));
}

function expert(state) {
  const order = orders[state.order][1]();
  const labels = order.map(taskLabel);
  const shown = groups.map((_, layer) => layer).filter((layer) => groups[layer].now);
  const z = order.map((task) => Float32Array.from(shown, (layer) => state.number < groups[layer].experts ?
    share(sharesOf(layer, "now"), layer, task, state.head, state.number) : NaN));
  const names = shown.map((layer) => escaped(groups[layer].label));
  const trace = { type: "heatmap", x: names, y: labels, z, ...SHARE, zmin: 0, zmax: data.routing.largest,
    ...numbersInside(T, shown.length), hoverongaps: false, colorbar: bar("share of the task's gate weight"),
    hovertemplate: `%{y}<br>layer %{x}, expert ${state.number}<br>share %{z:.3f}<extra></extra>` };
  const xaxis = { type: "category", title: { text: "layer" }, tickangle: shown.length > 6 ? -45 : 0,
    automargin: true, showgrid: false };
  const look = { xaxis, yaxis: taskAxis(labels), plot_bgcolor: UNKNOWN_CELL };
  return { traces: [trace], layout: base(tall(T), look) };
}

const figures = { gates, layers, history, similarity, map, conflict, conflict_history: conflictHistory,
  curves, expert };
