// The page: what is chosen, figures drawn when they come into view, notes in words.

const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
const MOST_PICKED = 40; // curves in one figure
const byId = (id) => document.getElementById(id);

const state = { layer: 0, head: "mean", view: "now", order: "cluster", number: 0, picked: new Set(),
  family: Object.keys(data.curves)[0] };

// -- figures --

const AFTER = { gates: gatesNote, conflict: conflictNote, expert: expertNote };

const waiting = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((e) => e.isIntersecting)) {
    waiting.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "300px" });

async function draw(box) {
  if (box.id === "table") fillTable();
  else await drawFigure(box);
  box.dataset.drawn = Number(box.dataset.drawn || 0) + 1;
}

async function drawFigure(box) {
  const { traces, layout } = figures[box.id](state);
  await Plotly.react(box, traces, layout, CONFIG);
  if (AFTER[box.id]) byId(`${box.id}-note`).textContent = AFTER[box.id]();
  if (!box.dataset.drawn) wire(box);
}

// Draw these again: now if they are in view, else when they come into it.
function renew(...ids) {
  for (const box of ids.map(byId).filter((b) => b)) {
    waiting.unobserve(box);
    waiting.observe(box);
  }
}

function wire(box) {
  if (box.id === "gates") box.on("plotly_click", ({ points: [cell] }) => choose("number", cell.x));
  if (box.id === "layers") box.on("plotly_click", ({ points: [point] }) => chooseLayer(point.pointNumber));
  if (box.id === "similarity") box.on("plotly_relayout", followRows);
}

// The tree beside the matrix shows the same rows as the matrix.
function followRows(change) {
  const box = byId("similarity");
  const range = box.layout.yaxis.range;
  if (("yaxis.range[0]" in change || change["yaxis.autorange"] !== undefined) && range) {
    Plotly.relayout(box, { "yaxis2.range": [...range] });
  }
}

// -- notes in words --

function gatesNote() {
  const { label, numbers, dead, experts } = groups[state.layer];
  const effective = numbers.effective_experts.toFixed(1);
  const uses = `Layer ${label}: a task uses ${effective} of ${experts} experts in effect`;
  const gone = dead.length ? `nobody uses ${listed(dead.map((e) => `expert ${e}`))}` : "no expert is dead";
  const moved = numbers.drift === undefined ? "" :
    `; ${percent(numbers.drift)} of a task's weight moved since the start`;
  const rest = data.routing.note ? ` (Shown are ${data.routing.note}.)` : "";
  return `${uses}; ${gone}${moved}.${rest}`;
}

function conflictNote() {
  const { labels, cosines } = data.conflict;
  const matrix = once("conflict", () => unpackBytes(cosines, -1, 1));
  const found = [];
  labels.forEach((a, i) => {
    for (let j = 0; j < i; j++) found.push([matrix[i * labels.length + j], labels[j], a]);
  });
  const worst = found.filter(([value]) => value < 0).sort((a, b) => a[0] - b[0]).slice(0, 3);
  if (!worst.length) return "No two gradients opposed each other in that step.";
  return `Most opposed: ${worst.map(([value, a, b]) => `${a} and ${b} (${value.toFixed(2)})`).join(", ")}.`;
}

function expertNote() {
  const with_it = groups.filter((group) => state.number < group.experts);
  const dead = with_it.filter((group) => group.dead.includes(state.number));
  const users = [];
  groups.forEach((group, layer) => {
    const values = state.number < group.experts ? sharesOf(layer, "now") : null;
    for (const task of values ? data.order : []) {
      users.push([share(values, layer, task, state.head, state.number), task, layer]);
    }
  });
  users.sort((a, b) => (b[0] || 0) - (a[0] || 0));
  const first = users.slice(0, 6).filter(([value]) => value > 0)
    .map(([value, task, layer]) => `${data.tasks.label[task]} (${percent(value)} in ${groups[layer].label})`);
  const where = dead.length ? `; nobody uses it in ${listed(dead.map((g) => g.label))}` : "";
  return `${with_it.length} of ${groups.length} layers have an expert ${state.number}${where}. ` +
    (first.length ? `Used most by ${first.join(", ")}.` : "No task uses it.");
}

function listed(texts) {
  return texts.slice(0, 6).join(", ") + (texts.length > 6 ? ` and ${texts.length - 6} more` : "");
}

function percent(value) {
  return `${(100 * value).toFixed(1)} %`;
}

// -- controls --

const DEPENDS = { layer: ["gates", "table"], head: ["gates", "expert", "table"], view: ["gates"],
  order: ["gates", "expert"], number: ["expert"], family: ["curves"] };

function choose(name, value) {
  state[name] = value;
  if (byId(name)) byId(name).value = String(value);
  renew(...DEPENDS[name]);
}

function chooseLayer(layer) {
  if (!groups[layer] || !groups[layer].now) return;
  if (state.view !== "now" && !groups[layer].start) choose("view", "now");
  choose("layer", layer);
  fillViews();
}

function fill(select, options, value) {
  select.replaceChildren(...options.map(([key, text]) => new Option(text, key)));
  select.value = String(value);
}

function offer(name, options, change = (value) => choose(name, value)) {
  const select = byId(name);
  if (!select) return;
  fill(select, options, state[name]);
  select.addEventListener("change", () => change(select.value));
}

function fillViews() {
  const views = [["now", "shares now"]];
  if (groups[state.layer].start) {
    views.push(["start", "shares at the start"], ["change", "change since the start"]);
  }
  fill(byId("view"), views, state.view);
}

function startRouting() {
  const drawn = groups.map((_, layer) => layer).filter((layer) => groups[layer].now);
  const apart = (layer) => groups[layer].numbers.between_tasks || 0;
  state.layer = drawn.reduce((best, layer) => (apart(layer) > apart(best) ? layer : best), drawn[0]);
  offer("layer", drawn.map((layer) => [layer, groups[layer].label]), (value) => chooseLayer(Number(value)));
  const step = (by) => chooseLayer(drawn[drawn.indexOf(state.layer) + by]);
  byId("layer-before").addEventListener("click", () => step(-1));
  byId("layer-after").addEventListener("click", () => step(1));
  const heads = Math.max(...groups.map((group) => group.heads));
  const each = Array.from({ length: heads }, (_, h) => [h, `head ${h}`]);
  byId("head-label").hidden = heads === 1;
  offer("head", [["mean", "mean of all"], ...each],
    (value) => choose("head", value === "mean" ? value : Number(value)));
  fillViews();
  byId("view").addEventListener("change", (event) => choose("view", event.target.value));
  offer("order", Object.entries(orders).filter(([key]) => key !== "group" || named.length)
    .map(([key, [text]]) => [key, text]));
  const used = rowsOf(state.layer, "now", "mean", data.order).flatMap((row) => [...row.entries()]);
  state.number = used.reduce((best, entry) => (entry[1] > best[1] ? entry : best), [0, 0])[0];
  const most = Math.max(...groups.map((group) => group.experts));
  offer("number", Array.from({ length: most }, (_, e) => [e, String(e)]),
    (value) => choose("number", Number(value)));
}

function startCurves() {
  offer("family", Object.entries(data.curves).map(([key, { title }]) => [key, title]));
  const picked = byId("picked");
  byId("find").addEventListener("input", fillPicker);
  picked.addEventListener("change", () => {
    for (const option of picked.options) {
      const task = Number(option.value);
      if (option.selected && state.picked.size < MOST_PICKED) state.picked.add(task);
      else if (!option.selected) state.picked.delete(task);
    }
    renew("curves");
  });
  byId("highest").addEventListener("click", () => pick(byLastValue().slice(-6).reverse()));
  byId("lowest").addEventListener("click", () => pick(byLastValue().slice(0, 6)));
  byId("none").addEventListener("click", () => pick([]));
  pick(T <= 8 ? data.tasks.label.map((_, task) => task) : byLastValue().slice(-6).reverse());
}

// Task ids by their last known value of the curves shown, lowest first.
function byLastValue() {
  const values = familyValues(state.family);
  const last = data.tasks.label.map((_, task) => {
    for (let p = data.curves[state.family].steps.length - 1; p >= 0; p--) {
      if (!Number.isNaN(values[p * T + task])) return values[p * T + task];
    }
    return NaN;
  });
  return [...last.keys()].filter((task) => !Number.isNaN(last[task])).sort((a, b) => last[a] - last[b]);
}

function pick(tasks) {
  state.picked = new Set(tasks);
  fillPicker();
  renew("curves");
}

function fillPicker() {
  const wanted = byId("find").value.toLowerCase();
  const shown = data.order.filter((task) => data.tasks.name[task].toLowerCase().includes(wanted));
  byId("picked").replaceChildren(...shown.map((task) => {
    const chosen = state.picked.has(task);
    return new Option(data.tasks.label[task], task, chosen, chosen);
  }));
}

// -- start --

if (groups.length) startRouting();
if (byId("picked")) startCurves();
byId("search").addEventListener("input", () => renew("table"));
for (const box of document.querySelectorAll(".plot, #table")) waiting.observe(box);
