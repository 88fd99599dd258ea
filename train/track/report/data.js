// What the page knows. Legend: T tasks, H heads, E experts.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const T = data.tasks.label.length;
const groups = data.routing ? data.routing.groups : [];
const UNKNOWN = 255; // of a packed byte, whose steps go from 0 to 254

function bytesOf(text) {
  const raw = atob(text);
  const out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}

function unpackBytes(text, low, high) {
  const bytes = bytesOf(text);
  const out = new Float32Array(bytes.length);
  const step = (high - low) / (UNKNOWN - 1);
  for (let i = 0; i < out.length; i++) out[i] = bytes[i] === UNKNOWN ? NaN : low + step * bytes[i];
  return out;
}

function unpackFloats(text) {
  const bytes = bytesOf(text);
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

const unpacked = new Map(); // large arrays are unpacked when they are first drawn

function once(key, make) {
  if (!unpacked.has(key)) unpacked.set(key, make());
  return unpacked.get(key);
}

// Shares of all tasks in a layer, [T * H * E], "now" or at the "start"; null where the file has none.
function sharesOf(layer, when) {
  const packed = groups[layer][when];
  return packed && once(`${layer} ${when}`, () => unpackBytes(packed, 0, 1));
}

// The share of one expert, of one head or the mean over heads.
function share(values, layer, task, head, expert) {
  const { heads: H, experts: E } = groups[layer];
  if (head !== "mean") return values[(task * H + Math.min(head, H - 1)) * E + expert];
  let sum = 0;
  for (let h = 0; h < H; h++) sum += values[(task * H + h) * E + expert];
  return sum / H;
}

// Rows of tasks in the given order, each a Float32Array of experts; "change": now less the start.
function rowsOf(layer, view, head, order) {
  const now = sharesOf(layer, view === "start" ? "start" : "now");
  const then = view === "change" ? sharesOf(layer, "start") : null;
  return order.map((task) =>
    Float32Array.from({ length: groups[layer].experts }, (_, expert) => {
      const value = share(now, layer, task, head, expert);
      return then ? value - share(then, layer, task, head, expert) : value;
    })
  );
}

// The task's experts of a layer, largest share first: [[expert, share], ...].
function topExperts(layer, task, head, most) {
  const row = rowsOf(layer, "now", head, [task])[0];
  return [...row.entries()].filter(([, s]) => s >= 0.05).sort((a, b) => b[1] - a[1]).slice(0, most);
}

const orders = {
  cluster: ["by routing: alike side by side", () => data.order],
  group: ["by given group", () => [...data.order].sort((a, b) => compareText(groupOf(a), groupOf(b)))],
  listed: ["as listed", () => data.order.map((_, i) => i)],
};

function groupOf(task) {
  return data.tasks.group[task] === null ? "" : data.tasks.group[task];
}

function compareText(a, b) {
  return a < b ? -1 : a > b ? 1 : 0;
}

const named = [...new Set(data.tasks.group.filter((group) => group !== null))].sort(compareText);
const INKS = ["#1f5fa8", "#c4500b", "#1f7a3d", "#a3228e", "#8c5a00", "#c01f2e", "#0e7490", "#5b3fb0"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "x"];

function inkOf(group) {
  const place = named.indexOf(group);
  return place < 0 ? "#1c2733" : INKS[place % INKS.length];
}

function symbolOf(group) {
  return SYMBOLS[Math.floor(Math.max(0, named.indexOf(group)) / INKS.length) % SYMBOLS.length];
}

// plotly reads a little HTML in its texts, and formulas between dollars; a task's name is text.
function escaped(text) {
  return text.replace(/[&<>$]/g, (mark) => `&#${mark.charCodeAt(0)};`);
}

function taskLabel(task) {
  const label = escaped(data.tasks.label[task]);
  return named.length ? `<span style="color:${inkOf(data.tasks.group[task])}">${label}</span>` : label;
}
