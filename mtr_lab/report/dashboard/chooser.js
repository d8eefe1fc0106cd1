// Choosing an operating point, and what to type for it.

const DIGITS = { speedup: (value) => `${value.toFixed(2)} × as fast`, reduction: (value) => `${percent(value)} % of the FLOPs removed` };

const GOALS = {
  fastest: {
    title: "fastest within",
    unit: (metric) => `${metric.unit === "%" ? "points" : metric.unit} of the unreduced ${metric.name}`,
    steps: (metric) => (metric.unit === "%" ? [1, 2, 5, 10, 20] : [0.05, 0.1, 0.2, 0.5, 1]),
    fits: (point, limit, metric, base) =>
      base != null && metric.better * metric.scale * (base[metric.key] - point[metric.key]) <= limit,
    value: (point) => point.speedup ?? 0,
    second: (point) => point.reduction ?? 0,
  },
  best: {
    title: "best at no more than",
    unit: () => "GFLOPs per image",
    steps: (metric, candidates) => [Number(figure(median(candidates.map((point) => 1e-9 * point.flops_true))))],
    fits: (point, limit) => 1e-9 * point.flops_true <= limit,
    value: (point, metric) => metric.better * point[metric.key],
    second: (point) => -point.flops_true,
  },
  cheapest: {
    title: "fewest FLOPs within",
    unit: (metric) => `${metric.unit === "%" ? "points" : metric.unit} of the unreduced ${metric.name}`,
    steps: (metric) => (metric.unit === "%" ? [1, 2, 5, 10, 20] : [0.05, 0.1, 0.2, 0.5, 1]),
    fits: (point, limit, metric, base) =>
      base != null && metric.better * metric.scale * (base[metric.key] - point[metric.key]) <= limit,
    value: (point) => -point.flops_true,
    second: (point, metric) => metric.better * point[metric.key],
  },
};

const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? 0;
const baseOf = (point) => point.run.result.points.find((other) => other.policy === "none");

/** The best point for the goal among those shown, for each backbone. */
function chosenPoints(goal, limit) {
  const metric = metricNow();
  const candidates = visible.filter((point) => !point.unreduced && point[metric.key] != null && point.flops_true != null);
  const found = [];
  for (const [, members] of groupBy(candidates, (point) => JSON.stringify([point.backbone, point.dataset, point.hardware]))) {
    const fitting = members.filter((point) => goal.fits(point, limit, metric, baseOf(point)));
    fitting.sort((a, b) => goal.value(b, metric) - goal.value(a, metric) || goal.second(b, metric) - goal.second(a, metric));
    if (fitting.length) found.push(fitting[0]);
  }
  return found;
}

const pythonValue = (value) =>
  value === null ? "None" : value === true ? "True" : value === false ? "False"
  : Array.isArray(value) ? `[${value.map(pythonValue).join(", ")}]` : JSON.stringify(value);
const hydraValue = (value) =>
  Array.isArray(value) ? `[${value.map(hydraValue).join(",")}]` : value === null ? "null" : String(value);
const shellWord = (word) => (/^[\w@%+=:,./-]*$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

/** The budget and the changed settings of a point, by name. */
function settingsOf(point) {
  const asked = point.budget ? { [point.budget.key]: point.budget.asked } : point.ratio != null ? { ratio: point.ratio } : {};
  return { ...asked, ...point.run.changed };
}

function patchCall(point) {
  if (point.model) return `model = mtr_lab.create_model(${JSON.stringify(point.model)}, pretrained=True)`;
  const settings = Object.entries(settingsOf(point)).map(([key, value]) => `${key}=${pythonValue(value)}`);
  if (point.budget) settings.push("images=images");
  return `mtr_lab.patch(model, ${[JSON.stringify(point.policy), ...settings].join(", ")})`;
}

function command(point) {
  const task = point.task === "classification" ? [] : [`task=${point.task}`];
  const named = [...task, `backbone=${point.model ?? point.backbone}`, `dataset=${point.dataset}`];
  if (point.model) return ["mtr-lab eval", ...named.map(shellWord), "mtr.ratio=0"].join(" ");
  const settings = settingsOf(point);
  if (point.budget) settings.ratio = null;
  const words = Object.entries(settings).map(([key, value]) => `mtr.${key}=${hydraValue(value)}`);
  return ["mtr-lab eval", ...[...named, `reduction=${point.policy}`, ...words].map(shellWord)].join(" ");
}

/** A line of code with a button that copies it. */
function code(text) {
  const button = h("button", { type: "button", onclick: () => copy(text, button) }, "Copy");
  return h("div", { class: "code" }, h("code", {}, text), button);
}

async function copy(text, button) {
  const area = h("textarea", {}, text); // the clipboard's own interface is closed to pages from a file
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  button.textContent = done ? "Copied" : "Select it, and copy";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function buildChooser() {
  const goal = h(
    "select",
    { id: "goal", "aria-label": "Goal", onchange: (event) => { state.goal = event.target.value; render(); } },
    Object.entries(GOALS).map(([key, { title }]) => h("option", { value: key, selected: key === state.goal }, title)),
  );
  const limit = h("input", {
    id: "limit", type: "number", min: 0, step: "any", "aria-label": "Limit",
    oninput: (event) => { state.limit[limitKey()] = Number(event.target.value); remember(); drawChosen(); },
  });
  byId("chooser").replaceChildren(goal, limit, h("span", { id: "limit-unit" }));
}

const limitKey = () => `${state.goal}.${state.metric}`;

function drawChooser() {
  const metric = metricNow();
  const goal = GOALS[state.goal];
  const candidates = visible.filter((point) => !point.unreduced && point.flops_true != null);
  byId("chooser-section").hidden = !candidates.length;
  if (!candidates.length) return;
  const steps = goal.steps(metric, candidates);
  state.limit[limitKey()] ??= steps.find((step) => chosenPoints(goal, step).length) ?? steps[0];
  byId("goal").value = state.goal;
  byId("limit").value = state.limit[limitKey()];
  byId("limit-unit").textContent = goal.unit(metric);
  drawChosen();
}

function drawChosen() {
  const metric = metricNow();
  const found = chosenPoints(GOALS[state.goal], state.limit[limitKey()]);
  const untimed = state.goal === "fastest" && found.some((point) => point.speedup == null);
  byId("chosen").replaceChildren(
    ...(found.length ? found : [null]).map((point) =>
      point === null
        ? h("p", { class: "caption" }, "No point shown meets this limit.")
        : h(
            "div",
            { class: "chosen" },
            h("p", {}, opener(point), ` ${[
              point.ratio == null ? ratioName(point) : null,
              `${metric.name} ${metric.write(point[metric.key])} ${metric.unit}${interval(point, metric) && ` (${interval(point, metric)})`}`,
              `${figure(1e-9 * point.flops_true)} GFLOPs`,
              point.reduction == null ? null : DIGITS.reduction(point.reduction),
              point.speedup == null ? null : DIGITS.speedup(point.speedup),
            ].filter(Boolean).join(" · ")}`),
            code(patchCall(point)),
            code(command(point)),
          ),
    ),
    untimed ? h("p", { class: "caption" }, "Speed was not measured, so the point with the most FLOPs removed counts as the fastest.") : "",
  );
}
