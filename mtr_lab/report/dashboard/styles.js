// How policies are drawn, in light and dark mode: colours and markers are those of mtr_lab/report/looks.py.

const SYMBOLS = {
  circle: null,
  square: "2,2 10,2 10,10 2,10",
  diamond: "6,0 12,6 6,12 0,6",
  "triangle-up": "6,1 11.5,11 0.5,11",
  "triangle-down": "6,11 0.5,1 11.5,1",
  pentagon: "6,0.5 11.7,4.7 9.5,11.4 2.5,11.4 0.3,4.7",
  cross: "4,0.5 8,0.5 8,4 11.5,4 11.5,8 8,8 8,11.5 4,11.5 4,8 0.5,8 0.5,4 4,4",
  hexagon: "6,0.3 11,3.1 11,8.9 6,11.7 1,8.9 1,3.1",
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

const inDark = () => !print.matches && (state.theme ? state.theme === "dark" : dark.matches);
const theme = () => THEMES[inDark() ? "dark" : "light"];
const symbol = (policy) => data.looks[policy].marker;
const colour = (policy, { paper }) => data.looks[policy][paper === THEMES.dark.paper ? "on_dark" : "colour"];

function swatch(policy, open = policy === "none") {
  const outline = SYMBOLS[symbol(policy)];
  const own = colour(policy, theme());
  const paint = open ? { fill: "none", stroke: own, "stroke-width": 2 } : { fill: own };
  const shape = outline
    ? svg("polygon", { points: outline, ...paint })
    : svg("circle", { cx: 6, cy: 6, r: 4.8, ...paint });
  return svg("svg", { viewBox: "-1 -1 14 14", class: "swatch", "aria-hidden": "true" }, shape);
}
