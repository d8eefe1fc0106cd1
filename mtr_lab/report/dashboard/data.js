// The report's points, which of them are shown, and how they are named.

const initial = JSON.parse(await unpacked("data"));
const { costs: COSTS, speeds: SPEEDS } = initial.axes;
const FACETS = initial.axes.facets.filter((facet) => facet.key !== "task"); // which is a section
const METRICS = initial.axes.metrics.map((metric) => ({
  ...metric,
  scale: metric.unit === "%" ? 100 : 1,
  write: metric.unit === "%" ? percent : nats,
}));

const policies = new Map(); // policy and task -> number of its series
const places = new Map(); // series -> number of earlier series of its policy and task
const state = {
  task: null,
  theme: null, // that of the system
  search: "",
  chosen: Object.fromEntries(FACETS.map((facet) => [facet.key, new Set()])),
  metric: null,
  cost: COSTS[0].key,
  speed: SPEEDS[0].key,
  baseline: null,
  selected: null,
  sort: { points: null, differences: null, runs: null },
  training: null,
  latex: null, // the columns of the LaTeX table, those of one column of a paper
  whole: {}, // tables whose rows are all shown
  goal: "fastest",
  limit: {},
};
let data, all, points, visible; // all points; those of the task in view; of these those shown

function load(parsed) {
  data = parsed;
  all = data.points.map(({ run: r, point: i, places: alike, mean }) => {
    const run = data.runs[r];
    const point = mean ?? run.result.points[i]; // the mean is over seeds
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
      speedup: mean ? mean.speedup : (point.speedup ?? speedup(run.result.points, i)),
    };
  });
  for (const point of all) point.series = seriesOf(point);
  for (const { policy, task, series } of all) {
    if (places.has(series)) continue;
    const name = JSON.stringify([policy, task]);
    places.set(series, policies.get(name) ?? 0);
    policies.set(name, places.get(series) + 1);
  }
  const tasks = tasksNow();
  if (!tasks.includes(state.task)) state.task = tasks[0] ?? null;
  enter();
}

/** The tasks, that with the most points first. */
function tasksNow() {
  const groups = groupBy(all, (point) => point.task);
  return [...groups.keys()].sort((a, b) => groups.get(b).length - groups.get(a).length || a.localeCompare(b));
}

/** Turn to the points of the task in view. */
function enter() {
  points = all.filter((point) => point.task === state.task);
  for (const facet of FACETS) {
    facet.values = [...new Set(points.map((point) => facetValue(facet, point)).filter((value) => value !== null))];
    facet.values.sort((a, b) => isPicture(a) - isPicture(b) || a.localeCompare(b, "en", { numeric: true }));
    for (const value of state.chosen[facet.key])
      if (!facet.values.includes(value)) state.chosen[facet.key].delete(value);
  }
}

/** Of older results, which do not have it. A smaller model was timed in another run. */
function speedup(points, i) {
  const base = points.find((other) => other.policy === "none");
  return !points[i].model && points[i].img_per_s && base?.img_per_s ? points[i].img_per_s / base.img_per_s : null;
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
const isPicture = (name) => name.endsWith(" px"); // after the shares, in percent
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
  }) && (point.unreduced || isFound(point));

/** Whether every word of the search is in the point's names. */
const isFound = (point) => {
  point.text ??= [point.policy, ratioName(point), point.variant, point.backbone, point.dataset, point.hardware, ...point.runs.map((run) => run.name)].join(" ").toLowerCase();
  return state.search.toLowerCase().split(/\s+/).every((word) => point.text.includes(word));
};
const averaged = () => visible.some((point) => point.seeds);
const byCost = (a, b) => (a.ratio ?? a.reduction ?? 0) - (b.ratio ?? b.reduction ?? 0);

/** What tells a point from others of its policy: its variant, and the properties that differ among the points. */
function setting(point, among = visible) {
  if (!varying.has(among)) {
    const keys = ["backbone", "dataset", "hardware"];
    varying.set(among, keys.filter((key) => among.some((other) => other[key] !== among[0][key])));
  }
  const seeds = point.seeds && `mean of ${point.seeds.length} seeds`;
  return [point.variant, seeds, ...varying.get(among).map((key) => point[key])].filter(Boolean).join(" · ");
}
const varying = new WeakMap(); // points -> the properties that differ among them

/** What a task reads. */
const inputOf = ({ task }) => (task === "video" ? "video" : "image");

/** In settings and files the unreduced model is the policy none. */
const policyName = (point) => (point.unreduced ? "unreduced" : point.policy);
const label = (point, among = visible) =>
  [policyName(point), setting(point, among)].filter(Boolean).join(" · ");

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
  for (const item of items) {
    const name = key(item);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(item);
  }
  return groups;
}

const metricNow = () => METRICS.find((metric) => metric.key === state.metric);
