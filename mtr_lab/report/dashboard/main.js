// Draws the page; a live report asks its server for newer results.

let pointRows = [],
  differenceRowsShown = [];

function render() {
  visible = points.filter(isVisible);
  buildMetrics();
  byId("shown").textContent = `${visible.length} of ${points.length} points shown. Choose names to show only their points.`;
  byId("clear").hidden = !state.search && !FACETS.some((facet) => state.chosen[facet.key].size);
  drawCharts();
  drawLegend();
  drawChooser();
  const metric = metricNow();
  byId("tradeoff-caption").textContent =
    "Bars: 95 % intervals (Wilson for shares of images, else bootstrap over images), if the result has them" +
    `${averaged() ? "; for a mean over seeds, ± one standard deviation" : ""}. ` +
    "Grey band: Pareto front of the points shown, " +
    `for each ${metric.relative ? "backbone" : "dataset"} and number of images, of speeds also for each device. ` +
    `Circle and dashed line: unreduced model. ${metric.better < 0 ? "Lower is better. " : ""}` +
    "× unreduced: median over rounds that timed both models, with its 95 % interval. " +
    "Runs are timed apart, so absolute speeds of several runs have no Pareto front. " +
    "Points of nearly equal cost are drawn side by side. Click a point for its details.";
  const sorted = [...visible].sort(
    (a, b) => byCost(a, b) || a.policy.localeCompare(b.policy) || a.variant.localeCompare(b.variant),
  );
  pointRows = table("points", pointColumns(), sorted);
  const repeated = visible.some((point) => point.runs.length > 1 && !point.seeds);
  byId("points-caption").textContent =
    "Small print: the 95 % interval, or the figure that the heading names in small print. " +
    "GFLOPs: true FLOPs of one image, two per multiply-accumulate, with the cost of the reduction itself; " +
    "the literature counts multiply-accumulates of one scan direction." +
    (repeated ? " Points that have equal figures in several runs are one row, with the speed of the median run." : "") +
    data.remarks.filter(({ task }) => task === state.task).map(({ text }) => ` ${text}.`).join("") +
    (averaged() ? " Runs that differ only in mtr.seed are one row: mean ± standard deviation over the seeds." : "");
  differenceRowsShown = drawDifferences();
  drawAblation();
  drawRuns();
  remember();
}

function drawCharts() {
  drawTradeoffs();
  drawChart("tokens");
  drawTraining();
}

function drawPage() {
  const distinct = (key) => [...new Set(all.map((point) => point[key]))].sort();
  const images = [...new Set(all.map((point) => point.images))].sort((a, b) => a - b);
  const trained = [...new Set(data.trainings.map((run) => run.backbone))].join(", ");
  byId("title").textContent = distinct("backbone").join(", ") || trained || "Waiting for results";
  for (const id of ["tradeoff", "points", "differences", "tokens", "runs"]) byId(`${id}-section`).hidden = !all.length && !live;
  document.title = `${byId("title").textContent} · mtr_lab report`;
  const count = (number, name) => `${grouped(number)} ${name}${number === 1 ? "" : "s"}`;
  const inputs = all.length && all.every((point) => inputOf(point) === "video") ? "video" : "image";
  byId("summary").textContent = [
    distinct("task").join(", "),
    distinct("dataset").join(", "),
    images.length && (images.length > 1 ? `${grouped(images[0])} to ${grouped(images.at(-1))} ${inputs}s` : count(images[0], inputs)),
    count(data.runs.length, "run"),
    count(all.length, "point"),
    distinct("hardware").join("; "),
    `results read ${data.written.replace("T", " ").slice(0, 16)}`,
  ]
    .filter(Boolean)
    .join(" · ");
  byId("notes").hidden = !data.notes.length;
  byId("notes").querySelector("summary").textContent = count(data.notes.length, "note");
  byId("notes")
    .querySelector("ul")
    .replaceChildren(...data.notes.map((note) => h("li", {}, note)));
  buildFilters();
  render();
  buildActions("points", () => pointRows, flat, pointsLatex);
}

async function follow() {
  let tag = null;
  for (;;) {
    try {
      const answer = await fetch("data.json", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.status === 200) {
        load(await answer.json());
        tag = answer.headers.get("ETag");
        drawPage();
      }
      byId("live").textContent =
        answer.ok || answer.status === 304
          ? `Following, ${data.runs.length} runs so far`
          : `Stopped: ${await answer.text()}`;
      byId("live").dataset.state = answer.ok || answer.status === 304 ? "on" : "off";
    } catch {
      byId("live").textContent = "The server does not answer; these are its last results";
      byId("live").dataset.state = "off";
    }
    await new Promise((resolve) => setTimeout(resolve, 1500));
  }
}

/** The theme of the system, then the other one, then that of the system again. */
function turnTheme() {
  const other = dark.matches ? "light" : "dark";
  state.theme = state.theme === other ? null : other;
  showTheme();
  drawPage();
}

function showTheme() {
  document.documentElement.dataset.theme = state.theme ?? "";
  byId("theme").textContent = inDark() ? "Light" : "Dark";
}

recall();
load(initial);
showTheme();
buildFigure("cost", "against", COSTS);
buildFigure("speed", "against", SPEEDS);
buildFigure("tokens", "", null);
buildChooser();
buildActions("differences", () => differenceRowsShown, flatDifference, differencesLatex);
byId("baseline").addEventListener("change", (event) => {
  state.baseline = event.target.value;
  render();
});
byId("search").value = state.search;
byId("search").addEventListener("input", (event) => {
  state.search = event.target.value;
  render();
});
byId("theme").addEventListener("click", turnTheme);
byId("clear").addEventListener("click", () => {
  for (const facet of FACETS) state.chosen[facet.key].clear();
  state.search = byId("search").value = "";
  buildFilters();
  render();
});
document.addEventListener("keydown", (event) => {
  if (byId("lightbox").open) {
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  } else if (event.key === "Escape" && !byId("details").hidden) hideDetails();
});
dark.addEventListener("change", () => {
  showTheme();
  drawPage();
});
print.addEventListener("change", drawPage);
addEventListener("resize", drawAblation); // charts follow the window by themselves
drawPage();
if (state.selected) showDetails(state.selected);
byId("live").hidden = !live;
if (live) follow();
performance.mark("words");
// The words stand before the charts' library, the larger part of the page, is unpacked.
await new Promise((done) => setTimeout(done));
const library = h("script", {}, await unpacked("plotly"));
document.head.append(library);
library.remove(); // it has run
drawTradeoffs(); // of the first screen
performance.mark("charts");
await new Promise((done) => setTimeout(done));
if (new Set(points.map((point) => point.tokens.join())).size > MANY) drawInView("tokens");
else drawChart("tokens");
drawTraining();
document.documentElement.dataset.ready = "true";
