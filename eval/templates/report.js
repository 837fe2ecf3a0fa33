"use strict";
const SPECS = JSON.parse(document.getElementById("specs").textContent);
const PALETTES = {
  light: ["#1f5fbf", "#d1661c", "#17804f", "#8a3fb0", "#b3341f", "#0e8390", "#8a6100", "#5b6876"],
  dark: ["#7db2ff", "#ffab6b", "#6fd6a2", "#d3a1f2", "#ff9c87", "#6fd3de", "#efc767", "#aab6c3"],
};
const system = window.matchMedia("(prefers-color-scheme: dark)");
let chosen = null;
try { chosen = localStorage.getItem("scheme"); } catch { /* a page from a file may have no storage */ }

const scheme = () => chosen ?? (system.matches ? "dark" : "light");

function config() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const text = { labelColor: color("quiet"), titleColor: color("quiet"), labelFontSize: 11, titleFontSize: 11, titleFontWeight: 400 };
  return {
    background: "transparent",
    font: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif",
    view: { stroke: null },
    axis: { ...text, gridColor: color("line"), domainColor: color("line"), tickColor: color("line"), labelOverlap: true, labelLimit: 130 },
    legend: { ...text, symbolStrokeWidth: 2.5, labelLimit: 150 },
    range: { category: PALETTES[scheme()] },
  };
}

async function draw() {
  document.documentElement.dataset.scheme = scheme();
  delete document.body.dataset.drawn;
  const theme = config();
  let drawn = 0;
  for (const element of document.querySelectorAll("[data-chart]")) {
    const options = { actions: false, renderer: "svg", config: theme, tooltip: { theme: scheme() } };
    await window.vegaEmbed(element, structuredClone(SPECS[element.dataset.chart]), options);
    drawn += 1;
    await new Promise((resolve) => setTimeout(resolve));
  }
  document.body.dataset.drawn = String(drawn);
}

let drawing = Promise.resolve();
const redraw = () => { drawing = drawing.then(draw); };
document.documentElement.dataset.scheme = scheme();
requestAnimationFrame(() => setTimeout(redraw));
system.addEventListener("change", () => { if (chosen === null) redraw(); });
document.getElementById("scheme").addEventListener("click", () => {
  chosen = scheme() === "dark" ? "light" : "dark";
  try { localStorage.setItem("scheme", chosen); } catch { /* kept for this page only */ }
  redraw();
});

function sortBy(header) {
  const table = header.closest("table");
  const index = [...header.parentNode.children].indexOf(header);
  const up = header.getAttribute("aria-sort") !== "ascending";
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (row) => row.children[index].dataset.sort ?? row.children[index].textContent.trim();
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const numbers = !Number.isNaN(Number(x)) && !Number.isNaN(Number(y));
    return (up ? 1 : -1) * (numbers ? Number(x) - Number(y) : x.localeCompare(y, "en"));
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort(compare));
}
for (const header of document.querySelectorAll(".sortable th")) {
  header.tabIndex = 0;
  header.addEventListener("click", () => sortBy(header));
  header.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sortBy(header); }
  });
}

for (const browser of document.querySelectorAll(".browser")) {
  const filters = [...browser.querySelectorAll("[data-filter]")];
  const show = () => {
    for (const article of browser.querySelectorAll("article")) {
      article.hidden = !filters.every((filter) => {
        if (filter.dataset.filter === "words") return article.textContent.toLowerCase().includes(filter.value.toLowerCase());
        return filter.value === "" || article.dataset[filter.dataset.filter] === filter.value;
      });
    }
  };
  for (const filter of filters) filter.addEventListener("input", show);
}

if (REFRESH) {
  let seen = null;
  setInterval(async () => {
    try {
      const version = await (await fetch("version", { cache: "no-store" })).text();
      if (seen !== null && version !== seen) location.reload();
      seen = version;
      document.getElementById("watching").textContent = "watching";
    } catch {
      document.getElementById("watching").textContent = "the server has ended";
    }
  }, REFRESH);
}
