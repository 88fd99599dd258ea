// The table of tasks.

const sorting = { column: -1, down: false }; // -1: by the clustering

function tableColumns() {
  const columns = [["task", (task) => data.tasks.name[task]]];
  for (const [title, values] of Object.entries(data.rows)) columns.push([title, (task) => values[task]]);
  if (groups.length) columns.push(["top experts", (task) => topExperts(state.layer, task, state.head, 3)
    .map(([e, s]) => `${e} (${s.toFixed(2)})`).join(", ")]);
  return columns;
}

function fillTable() {
  const columns = tableColumns();
  const wanted = byId("search").value.toLowerCase();
  let tasks = data.order.filter((task) =>
    `${data.tasks.name[task]} ${groupOf(task)}`.toLowerCase().includes(wanted));
  if (sorting.column >= 0) {
    const value = columns[sorting.column][1];
    const known = tasks.filter((task) => value(task) !== null);
    known.sort((a, b) => compare(value(a), value(b)) * (sorting.down ? -1 : 1));
    tasks = [...known, ...tasks.filter((task) => value(task) === null)]; // unknown ones last, either way
  }
  byId("count").textContent = `${tasks.length.toLocaleString("en")} of ${T.toLocaleString("en")} tasks`;
  const isNumber = columns.map(([, value]) => data.order.some((task) => typeof value(task) === "number"));
  const head = document.createElement("tr");
  columns.forEach(([title], i) => head.append(headCell(title, i, isNumber[i])));
  byId("head-row").replaceChildren(head);
  byId("body").replaceChildren(...tasks.map((task) => {
    const row = document.createElement("tr");
    columns.forEach(([, value], i) => {
      const cell = document.createElement(i ? "td" : "th");
      if (!i) cell.scope = "row";
      cell.textContent = shown(value(task));
      cell.className = isNumber[i] ? "number" : "";
      row.append(cell);
    });
    return row;
  }));
}

function headCell(title, column, isNumber) {
  const cell = document.createElement("th");
  const button = document.createElement("button");
  const mark = sorting.column === column ? (sorting.down ? " ↓" : " ↑") : "";
  button.type = "button";
  button.textContent = title + mark;
  button.addEventListener("click", () => {
    sorting.down = sorting.column === column && !sorting.down;
    sorting.column = column;
    renew("table");
  });
  cell.scope = "col";
  cell.className = isNumber ? "number" : "";
  cell.append(button);
  return cell;
}

function compare(a, b) {
  return typeof a === "number" ? a - b : compareText(a, b);
}

function shown(value) {
  if (value === null) return "–";
  if (typeof value !== "number") return value;
  return Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(3);
}
