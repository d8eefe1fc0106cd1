// The report's points, which of them are shown, and how they are named.

const initial = JSON.parse(byId("data").textContent);
const { costs: COSTS, speeds: SPEEDS, facets: FACETS } = initial.axes;
const METRICS = initial.axes.metrics.map((metric) => ({
  ...metric,
  scale: metric.unit === "%" ? 100 : 1,
  write: metric.unit === "%" ? percent : nats,
}));

const places = new Map(); // series -> number of earlier series of its policy
const state = {
  chosen: Object.fromEntries(FACETS.map((facet) => [facet.key, new Set()])),
  metric: null,
  cost: COSTS[0].key,
  speed: SPEEDS[0].key,
  baseline: null,
  selected: null,
  sort: { points: null, differences: null, runs: null },
};
let data, points, visible;

function load(parsed) {
  data = parsed;
  points = data.points.map(({ run: r, point: i, places: alike, mean }) => {
    const run = data.runs[r];
    const point = mean ?? run.result.points[i]; // the mean is over seeds
    const speedups = (mean ? alike : [[r, i]]).map(([s, j]) => speedup(data.runs[s].result.points, j));
    return {
      ...point,
      id: `${run.name}#${i}`,
      run,
      places: alike,
      runs: alike.map(([index]) => data.runs[index]),
      result: point,
      task: run.result.task,
      backbone: run.result.backbone,
      dataset: run.result.dataset,
      hardware: run.hardware,
      variant: point.policy === "none" ? "" : run.variant,
      unreduced: point.policy === "none",
      latency_p50: point.latency_ms?.p50,
      latency_p95: point.latency_ms?.p95,
      speedup: speedups.includes(null) ? null : speedups.reduce((sum, value) => sum + value) / speedups.length,
    };
  });
  for (const point of points) point.series = seriesOf(point);
  for (const policy of [...new Set(points.map((point) => point.policy))].sort()) style(policy);
  for (const { policy, series } of points) {
    const before = [...places.keys()].filter((other) => JSON.parse(other)[0] === policy);
    if (!places.has(series)) places.set(series, before.length);
  }
  for (const facet of FACETS) {
    facet.values = [...new Set(points.map((point) => facetValue(facet, point)).filter((value) => value !== null))];
    facet.values.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    for (const value of state.chosen[facet.key])
      if (!facet.values.includes(value)) state.chosen[facet.key].delete(value);
  }
}

function speedup(points, i) {
  const base = points.find((other) => other.policy === "none");
  return points[i].img_per_s && base?.img_per_s ? points[i].img_per_s / base.img_per_s : null;
}

/** A point's value of a facet; null for the unreduced model, which is shown whatever policy or ratio is chosen. */
function facetValue({ key }, point) {
  if (isOfReduced(key) && point.unreduced) return null;
  return key === "ratio" ? ratioName(point) : point[key];
}

const isOfReduced = (key) => key === "policy" || key === "ratio";
const budgetName = ({ key, asked }) =>
  key === "speedup" ? `${figure(asked)}× as fast` : `drop of ${figure(100 * asked)} %`;
const budgetFigure = ({ key }, value) => (key === "speedup" ? `${figure(value)}×` : `${figure(100 * value)} %`);
const ratioName = (point) =>
  point.budget
    ? budgetName(point.budget)
    : point.ratio != null
      ? `${figure(100 * point.ratio)} %`
      : point.model
        ? "whole"
        : (picture(point) ?? "counts given");
const picture = (point) => point.resolution && `${point.resolution.join(" × ")} px`;
/** What was asked, in a narrow column of percentages. */
function askedShort(point) {
  if (point.budget) return budgetFigure(point.budget, point.budget.asked);
  if (point.ratio != null) return percent(point.ratio);
  return point.model ? "" : picture(point) ? "size" : "counts";
}
const seriesOf = (point) =>
  JSON.stringify([point.policy, point.variant, point.backbone, point.dataset, point.task, point.hardware]);
const isVisible = (point) =>
  FACETS.every((facet) => {
    const value = facetValue(facet, point);
    return value === null || !state.chosen[facet.key].size || state.chosen[facet.key].has(value);
  });
const averaged = () => visible.some((point) => point.seeds);
const byCost = (a, b) => (a.ratio ?? a.reduction ?? 0) - (b.ratio ?? b.reduction ?? 0);

/** What tells a point from others of its policy: its variant, and the properties that differ among the points. */
function setting(point, among = visible) {
  const varies = (key) => among.some((other) => other[key] !== point[key]);
  const keys = ["backbone", varies("dataset") ? "dataset" : "task", "hardware"];
  const seeds = point.seeds && `mean of ${point.seeds.length} seeds`;
  return [point.variant, seeds, ...keys.filter(varies).map((key) => point[key])].filter(Boolean).join(" · ");
}

const label = (point, among = visible) =>
  [point.unreduced ? "unreduced" : point.policy, setting(point, among)].filter(Boolean).join(" · ");

/** The interval over images, or the standard deviation if the point is a mean over seeds. */
function interval(point, metric, write = metric.write) {
  const sd = point[`${metric.key}_sd`];
  if (sd != null) return `± ${write(sd)}`;
  const ends = point[`${metric.key}_ci`];
  return ends && ends[0] != null && ends[1] != null && ends[0] !== ends[1]
    ? `${write(ends[0])} – ${write(ends[1])}`
    : "";
}

function numberOf(point, axis) {
  const value = point[axis.key];
  return value == null ? null : axis.scale * value;
}

function groupBy(items, key) {
  const groups = new Map();
  for (const item of items) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
  return groups;
}

const metricNow = () => METRICS.find((metric) => metric.key === state.metric);
