// Paired differences to a baseline.

const COMPARED = METRICS.filter((metric) => metric.compared);

/** The visible points that can be paired, grouped by the baseline they are compared with. */
function differenceRows() {
  const byPlace = new Map(points.flatMap((point) => point.places.map((place) => [place.join("/"), point])));
  const pairs = [];
  for (const pair of data.differences) {
    const [first, second] = [byPlace.get(pair.first.join("/")), byPlace.get(pair.second.join("/"))];
    if (!first || !second) continue; // of another task
    pairs.push({ base: first, point: second, pair, sign: 1 });
    if (!first.unreduced) pairs.push({ base: second, point: first, pair, sign: -1 });
  }
  const inView = pairs.filter(
    ({ base, point }) =>
      isVisible(point) &&
      base.series !== point.series &&
      FACETS.every(({ key }) => isOfReduced(key) || isVisibleIn(key, base)),
  );
  const bases = groupBy(inView, ({ base }) => (base.unreduced ? "unreduced" : base.series));
  return {
    bases,
    rowsOf: (base) =>
      (bases.get(base) ?? [])
        .map(({ base: to, point, pair, sign }) => ({
          id: point.id,
          point,
          base: to,
          ...Object.fromEntries(
            COMPARED.filter(({ key }) => pair[key]).map(({ key }) => {
              const {
                difference,
                ci: [lo, hi],
                p,
                p_holm,
              } = pair[key];
              const ci = sign > 0 ? [lo, hi] : [-hi || 0, -lo || 0];
              return [key, { value: sign * difference || 0, ci, p, p_holm, significant: p_holm < 0.05 }];
            }),
          ),
        }))
        .sort((a, b) => byCost(a.point, b.point) || a.point.policy.localeCompare(b.point.policy)),
  };
}

const isVisibleIn = (key, point) => !state.chosen[key].size || state.chosen[key].has(point[key]);

/** An interval on the scale of its column, with zero marked. */
function strip({ value, ci, significant }, metric, limit) {
  const x = (number) => 60 + (56 * number) / limit;
  const kind = !significant ? "unclear" : metric.better * value > 0 ? "better" : "worse";
  return svg(
    "svg",
    { viewBox: "0 0 120 14", class: `strip ${kind}`, "aria-hidden": "true" },
    svg("line", { x1: 60, x2: 60, y1: 0, y2: 14, class: "zero" }),
    svg("line", { x1: x(ci[0]), x2: x(ci[1]), y1: 7, y2: 7, class: "range" }),
    svg("circle", { cx: x(value), cy: 7, r: 3 }),
  );
}

function verdict({ value, significant }, metric) {
  return !significant ? "not significant" : metric.better * value > 0 ? "better" : "worse";
}

function differenceColumns(rows) {
  const metrics = COMPARED.filter((metric) => rows.some((row) => row[metric.key]));
  return [
    {
      key: "policy",
      head: ["Policy"],
      text: true,
      value: ({ point }) => `${point.policy} ${setting(point)}`,
      cell: ({ point }) => [opener(point)],
    },
    {
      key: "ratio",
      head: ["Asked, %"],
      value: ({ point }) => point.ratio ?? point.reduction,
      cell: ({ point }) => [
        point.budget ? askedShort(point) : point.ratio == null ? ratioName(point) : percent(point.ratio),
      ],
    },
    ...metrics.map((metric) => {
      const limit = Math.max(...rows.flatMap((row) => row[metric.key]?.ci ?? []).map(Math.abs), 1e-12);
      return {
        key: metric.key,
        head: [`Δ ${metric.name}`, metric.unit === "%" ? "percentage points" : metric.unit],
        value: (row) => row[metric.key]?.value,
        cell: (row) => {
          const difference = row[metric.key];
          if (!difference) return [ABSENT];
          const said = verdict(difference, metric);
          const mark = { better: "▲", worse: "▼" }[said] ?? "○";
          return [
            h(
              "div",
              {
                class: `difference ${said.split(" ")[0]}`,
                title: `${said}: p = ${difference.p.toPrecision(2)}, corrected ${difference.p_holm.toPrecision(2)}`,
              },
              h("span", { class: "mark", role: "img", "aria-label": said }, mark),
              h(
                "span",
                {},
                lines(signed(metric, difference.value), difference.ci.map((end) => signed(metric, end)).join(" … ")),
              ),
              strip(difference, metric, limit),
            ),
          ];
        },
      };
    }),
  ];
}

function drawDifferences() {
  const { bases, rowsOf } = differenceRows();
  const options = [...bases.keys()].sort((a, b) => (a === "unreduced") - (b === "unreduced"));
  const most = options.reduce(
    (best, key) => (key !== "unreduced" && bases.get(key).length > (bases.get(best)?.length ?? 0) ? key : best),
    null,
  );
  const chosen = options.includes(state.baseline) ? state.baseline : (most ?? options[0] ?? null);
  byId("baseline").replaceChildren(
    ...options.map((key) => {
      const [{ base }] = bases.get(key);
      return h(
        "option",
        { value: key, selected: key === chosen },
        key === "unreduced" ? "the unreduced model" : base.model ? label(base) : `${label(base)}, at the same ratio`,
      );
    }),
  );
  byId("baseline-line").hidden = !options.length;
  const rows = chosen ? rowsOf(chosen) : [];
  byId("differences").hidden = !rows.length;
  byId("differences-actions").hidden = !rows.length;
  const paired = data.runs.filter((run) => run.paired).length;
  const name = chosen === "unreduced" ? "the unreduced model" : chosen && label(bases.get(chosen)[0].base);
  byId("differences-caption").textContent = rows.length
    ? `Each point minus ${name}${chosen === "unreduced" || rows[0].base.model ? "" : " at the same asked ratio"}, image by image, ` +
      "with the 95 % interval of a paired bootstrap over images. " +
      "▲ better, ▼ worse: p < 0.05 after Holm's correction for all such comparisons of the report; ○ not significant. " +
      "p: McNemar's exact test for shares of images, for others a normal test with the bootstrap's standard error."
    : "Nothing to compare: paired differences need several points on the same images, and predictions.npz " +
      `beside result.json (${paired} of ${data.runs.length} runs have it).`;
  return table("differences", differenceColumns(rows), rows);
}
