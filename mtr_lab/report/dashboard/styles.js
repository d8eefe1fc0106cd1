// The look of a policy: colour, symbol and line, in light and dark mode.

// Petroff, "Accessible color sequences for data visualization", arXiv 2107.02270; dark mode lightens two of them.
const COLOURS = [
  "#3f90da",
  "#bd1f01",
  "#e08e00",
  "#832db6",
  "#1b8a6b",
  "#a96b59",
  "#e76300",
  "#8a7f45",
  "#717581",
  "#45a9b8",
];
const ON_DARK = { "#bd1f01": "#ff6b4f", "#832db6": "#c084f0" };
const SYMBOLS = {
  circle: null,
  square: "2,2 10,2 10,10 2,10",
  diamond: "6,0 12,6 6,12 0,6",
  "triangle-up": "6,1 11.5,11 0.5,11",
  "triangle-down": "6,11 0.5,1 11.5,1",
  pentagon: "6,0.5 11.7,4.7 9.5,11.4 2.5,11.4 0.3,4.7",
  cross: "4,0.5 8,0.5 8,4 11.5,4 11.5,8 8,8 8,11.5 4,11.5 4,8 0.5,8 0.5,4 4,4",
  hexagram: "6,0 7.8,3 11.2,3 9.5,6 11.2,9 7.8,9 6,12 4.2,9 0.8,9 2.5,6 0.8,3 4.2,3",
  x: "2.5,0.5 6,4 9.5,0.5 11.5,2.5 8,6 11.5,9.5 9.5,11.5 6,8 2.5,11.5 0.5,9.5 4,6 0.5,2.5",
  star: "6,0 7.5,4.1 11.8,4.2 8.4,6.8 9.6,11 6,8.6 2.4,11 3.6,6.8 0.2,4.2 4.5,4.1",
};
const DASHES = [
  ["solid", ""],
  ["dash", "6 4"],
  ["dot", "2 3"],
  ["dashdot", "6 3 2 3"],
  ["longdash", "10 4"],
]; // names for Plotly, patterns for SVG
const THEMES = {
  light: { paper: "#ffffff", ink: "#1d2126", soft: "#626b76", grid: "#e7e9ec", front: "#9aa3ad" },
  dark: { paper: "#191d22", ink: "#e6e9ec", soft: "#9aa4af", grid: "#2c333b", front: "#76818d" },
};

const styles = new Map(); // policy -> { colour, symbol }, assigned once

function swatch(policy, open = policy === "none") {
  const outline = SYMBOLS[style(policy).symbol];
  const own = colour(policy, theme());
  const paint = open ? { fill: "none", stroke: own, "stroke-width": 2 } : { fill: own };
  const shape = outline
    ? svg("polygon", { points: outline, ...paint })
    : svg("circle", { cx: 6, cy: 6, r: 4.8, ...paint });
  return svg("svg", { viewBox: "-1 -1 14 14", class: "swatch", "aria-hidden": "true" }, shape);
}

const theme = () => THEMES[dark.matches && !print.matches ? "dark" : "light"];

function style(policy) {
  if (policy === "none") return { colour: null, symbol: "circle" };
  if (!styles.has(policy)) {
    const slot = styles.size;
    const names = Object.keys(SYMBOLS);
    styles.set(policy, {
      colour: COLOURS[slot % COLOURS.length],
      symbol: names[(slot + Math.floor(slot / COLOURS.length)) % names.length],
    });
  }
  return styles.get(policy);
}

function colour(policy, { ink, paper }) {
  const own = style(policy).colour;
  return own === null ? ink : paper === THEMES.dark.paper ? (ON_DARK[own] ?? own) : own;
}
