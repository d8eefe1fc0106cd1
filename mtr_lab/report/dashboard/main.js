// Draws the page; a live report asks its server for newer results.

let pointRows = [],
  differenceRowsShown = [];

function render() {
  visible = points.filter(isVisible);
  buildMetrics();
  byId("shown").textContent =
    `${visible.length} of ${points.length} points shown. A group without a choice shows all its points.`;
  byId("clear").hidden = !FACETS.some((facet) => state.chosen[facet.key].size);
  for (const kind of ["cost", "speed", "tokens"]) drawChart(kind);
  drawLegend();
  const metric = metricNow();
  byId("tradeoff-caption").textContent =
    "Bars: 95 % intervals (Wilson for shares of images, else bootstrap over images), if the result has them" +
    `${averaged() ? "; for a mean over seeds, ± one standard deviation" : ""}. ` +
    "Grey band: Pareto front of the points shown, " +
    `one per ${metric.relative ? "backbone" : "task, dataset"} and number of images, ` +
    "and in the speed chart per hardware. " +
    `Dashed: unreduced model. ${metric.better < 0 ? "Lower is better. " : ""}` +
    "Speeds have no interval, and only speeds of one run were measured under the same conditions. " +
    "Click a point for its details.";
  const sorted = [...visible].sort(
    (a, b) => byCost(a, b) || a.policy.localeCompare(b.policy) || a.variant.localeCompare(b.variant),
  );
  pointRows = table("points", pointColumns(), sorted);
  const repeated = visible.some((point) => point.runs.length > 1 && !point.seeds);
  byId("points-caption").textContent =
    "Small print: the 95 % interval, or the figure that the heading names in small print. " +
    "GFLOPs: true FLOPs per image, two per multiply-accumulate, with the cost of the reduction itself; " +
    "the literature counts multiply-accumulates, and one direction." +
    (repeated
      ? " An unreduced model with equal figures in several runs is one row, with the speed of the median run."
      : "") +
    data.remarks.map((remark) => ` ${remark}.`).join("") +
    (averaged() ? " Runs that differ only in mtr.seed are one row: mean ± standard deviation over the seeds." : "");
  differenceRowsShown = drawDifferences();
  drawRuns();
}

function drawPage() {
  const distinct = (key) => [...new Set(points.map((point) => point[key]))].sort();
  const images = [...new Set(points.map((point) => point.images))].sort((a, b) => a - b);
  byId("title").textContent = distinct("backbone").join(", ") || "Waiting for results";
  document.title = `${byId("title").textContent} · mtr_lab report`;
  const count = (number, name) => `${number.toLocaleString("en")} ${name}${number === 1 ? "" : "s"}`;
  byId("summary").textContent = [
    distinct("task").join(", "),
    distinct("dataset").join(", "),
    images.length && (images.length > 1 ? `${images[0]} to ${images.at(-1)} images` : count(images[0], "image")),
    count(data.runs.length, "run"),
    count(points.length, "point"),
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

load(initial);
buildFigure("cost", "against", COSTS);
buildFigure("speed", "against", SPEEDS);
buildFigure("tokens", "", null);
buildActions("points", () => pointRows, flat, pointsLatex);
buildActions("differences", () => differenceRowsShown, flatDifference, differencesLatex);
byId("baseline").addEventListener("change", (event) => {
  state.baseline = event.target.value;
  render();
});
byId("clear").addEventListener("click", () => {
  for (const facet of FACETS) state.chosen[facet.key].clear();
  buildFilters();
  render();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("details").hidden) hideDetails();
});
dark.addEventListener("change", drawPage);
print.addEventListener("change", drawPage);
drawPage();
byId("live").hidden = !live;
if (live) follow();
