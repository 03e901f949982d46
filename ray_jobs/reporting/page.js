"use strict";
const plots = JSON.parse(document.getElementById("plots").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const chosen = {};
// plotly.js has a button that sends a chart to its maker's server
const config = {
  responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
};

// text and lines in the page's colours of the moment
function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const [text, muted, line, panel] = ["--text", "--muted", "--line", "--panel"].map((name) => style.getPropertyValue(name).trim());
  const copy = structuredClone(layout);
  copy.font = { color: text, family: "system-ui, sans-serif", size: 12 };
  copy.modebar = { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: text };
  copy.hoverlabel = { bgcolor: panel, bordercolor: line, font: { color: text }, align: "left" };
  for (const key of Object.keys(copy)) {
    if (/^[xy]axis/.test(key)) Object.assign(copy[key], { gridcolor: line, linecolor: line, tickcolor: line });
  }
  return copy;
}

function draw(name) {
  const place = document.getElementById("plot-" + name);
  if (!place) return;
  const { figure } = plots[name][chosen[name] || 0];
  Plotly.react(place, figure.data, themed(figure.layout), config);
}

function drawAll() {
  Object.keys(plots).forEach(draw);
}

for (const select of document.querySelectorAll("select[data-plot]")) {
  select.addEventListener("change", () => {
    chosen[select.dataset.plot] = select.selectedIndex;
    draw(select.dataset.plot);
  });
}
dark.addEventListener("change", drawAll);
drawAll();

// numbers by value, the rest by text; cells without a value stay last
function value(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return cell.classList.contains("number") ? null : cell.textContent;
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" ? a - b : a.localeCompare(b);
}

const table = document.getElementById("leaderboard");
for (const head of table ? table.tHead.rows[0].cells : []) {
  head.tabIndex = 0;
  const sort = () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const column = head.cellIndex;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      return x === null || y === null ? compare(x, y) : descending ? compare(y, x) : compare(x, y);
    });
    table.tBodies[0].append(...rows);
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
}
