// Parallel coordinates of an ablation: settings of a policy, then what they cost and give.

const sorted = (values) => [...values].sort((a, b) => String(a).localeCompare(String(b), "en", { numeric: true }));
const settingOf = (point, key) => JSON.stringify(point.run.result.config.mtr?.[key] ?? null).replaceAll('"', "");

/** The settings that differ between runs of the same policy. */
function ablated(candidates) {
  const keys = new Set();
  for (const [, members] of groupBy(candidates, (point) => point.policy)) {
    const names = Object.keys(members[0].run.result.config.mtr ?? {});
    for (const key of names)
      if (!["ratio", "policy", "seed", "speedup", "max_drop", "resolution"].includes(key))
        if (new Set(members.map((point) => settingOf(point, key))).size > 1) keys.add(key);
  }
  return [...keys];
}

function drawAblation() {
  const metric = metricNow();
  const candidates = visible.filter((point) => !point.unreduced && point[metric.key] != null);
  const settings = ablated(candidates);
  byId("ablation-section").hidden = settings.length < 2;
  if (settings.length < 2) return;
  const axes = [
    ...settings.map((key) => {
      const values = sorted(new Set(candidates.map((point) => settingOf(point, key))));
      const at = new Map(values.map((value, i) => [value, values.length > 1 ? i / (values.length - 1) : 0.5]));
      const ticks = values.length > 12 ? values.filter((_, i) => i % Math.ceil(values.length / 12) === 0) : values;
      return { title: key, of: (point) => at.get(settingOf(point, key)), ticks: ticks.map((value) => [at.get(value), value.length > 16 ? `${value.slice(0, 15)}…` : value]) };
    }),
    ...[{ ...COSTS.find((axis) => axis.key === "reduction"), name: "removed, %" }, { ...metric, name: `${metric.name}, ${metric.unit}` }].map((axis) => {
      const values = candidates.map((point) => numberOf(point, axis)).filter((value) => value != null);
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const span = high - low || 1;
      const ends = high > low ? [low, (low + high) / 2, high] : [low];
      return { title: axis.name, of: (point) => (numberOf(point, axis) - low) / span, ticks: ends.map((value) => [(value - low) / span, figure(value)]) };
    }),
  ];
  const room = byId("ablation").clientWidth;
  const [width, height, top, bottom] = [Math.max(room, 110 * axes.length), 320, 34, 14];
  const x = (i) => 60 + ((width - 140) * i) / (axes.length - 1);
  const y = (share) => height - bottom - share * (height - top - bottom);
  const colours = theme();
  const lines = candidates.map((point) => {
    const line = svg("polyline", {
      points: axes.map((axis, i) => `${x(i)},${y(axis.of(point))}`).join(" "),
      fill: "none",
      stroke: colour(point.policy, colours),
      "stroke-width": point.id === state.selected ? 4 : 1.6,
      "stroke-opacity": candidates.length > 100 ? 0.25 : 0.7,
    });
    line.append(svg("title", {}, `${label(point)}, ${ratioName(point)}: ${metric.name} ${metric.write(point[metric.key])}`));
    line.addEventListener("click", () => showDetails(point.id));
    return line;
  });
  const text = (content, attributes) => svg("text", { fill: colours.ink, "font-size": 12, ...attributes }, content);
  byId("ablation").replaceChildren(
    svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Settings against ${metric.name}`, style: `width: ${width}px` },
      ...lines,
      ...axes.flatMap((axis, i) => [
        svg("line", { x1: x(i), x2: x(i), y1: y(0), y2: y(1), stroke: colours.soft }),
        text(axis.title, { x: x(i), y: 14, "text-anchor": "middle", "font-weight": 600 }),
        ...axis.ticks.map(([share, value]) => text(value, { x: x(i) + 5, y: y(share) + 4, stroke: colours.paper, "stroke-width": 3, "paint-order": "stroke" })),
      ]),
    ),
  );
}
