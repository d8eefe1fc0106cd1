// The tables of points and runs.

const ROWS = 50; // shown at first

/** Text is left-aligned; narrow windows leave out minor columns. */
const classOf = ({ text, minor }) => [text && "text", minor && "minor"].filter(Boolean).join(" ") || null;

/** Fill a table. Columns: key, head, value(row) to sort by, cell(row) -> nodes, see classOf. */
function table(id, columns, rows) {
  const sort = state.sort[id];
  const column = columns.find((candidate) => candidate.key === sort?.key);
  const ordered = [...rows];
  if (column) {
    ordered.sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (x == null || y == null) return (x == null) - (y == null); // missing values come last in both directions
      return sort.direction * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    });
  }
  const focused = document.activeElement?.closest?.(`#${id} th`)?.dataset.key;
  const head = columns.map((candidate) => {
    const active = candidate.key === column?.key;
    const button = h(
      "button",
      {
        type: "button",
        onclick: () => {
          state.sort[id] = { key: candidate.key, direction: active ? -sort.direction : 1 };
          render();
        },
      },
      h("span", {}, candidate.head[0], active ? h("i", { "aria-hidden": "true" }, sort.direction > 0 ? "▲" : "▼") : null),
      candidate.head[1] ? h("small", {}, candidate.head[1]) : null,
    );
    return h(
      "th",
      {
        scope: "col",
        class: classOf(candidate),
        "data-key": candidate.key,
        title: candidate.title,
        "aria-sort": active ? (sort.direction > 0 ? "ascending" : "descending") : "none",
      },
      button,
    );
  });
  const rowsShown = state.whole[id] ? ordered : ordered.slice(0, ROWS);
  const body = rowsShown.map((row) =>
    h(
      "tr",
      { class: row.id && row.id === state.selected ? "selected" : null },
      columns.map((candidate, i) =>
        h(i ? "td" : "th", { class: classOf(candidate), scope: i ? null : "row" }, candidate.cell(row)),
      ),
    ),
  );
  byId(id).replaceChildren(h("thead", {}, h("tr", {}, head)), h("tbody", {}, body));
  const more = ordered.length - rowsShown.length;
  byId(`${id}-more`).replaceChildren(
    more ? h("button", { type: "button", onclick: () => { state.whole[id] = true; render(); } }, `Show ${grouped(more)} more rows`) : "",
  );
  if (focused)
    byId(id)
      .querySelector(`th[data-key="${CSS.escape(focused)}"] button`)
      ?.focus();
  return ordered;
}

const opener = (point) =>
  h(
    "button",
    { type: "button", class: "opener", "data-point": point.id, onclick: () => showDetails(point.id) },
    swatch(point.policy),
    h("span", {}, policyName(point)),
    setting(point) ? h("small", {}, setting(point)) : null,
  );

function pointColumns() {
  const has = (key) => visible.some((point) => point[key] != null);
  const number = (key, head, write, second) => ({
    key,
    head,
    value: (p) => p[key],
    cell: (p) => lines(shown(p[key], write), second?.(p)),
  });
  return [
    {
      key: "policy",
      head: ["Policy"],
      text: true,
      value: (p) => `${policyName(p)} ${setting(p)}`,
      cell: (p) => [opener(p)],
    },
    number("reduction", ["FLOPs removed, %", "asked"], percent, (p) =>
      p.unreduced ? "" : askedShort(p),
    ),
    number(
      "flops_true",
      ["GFLOPs", "literature"],
      (v) => figure(1e-9 * v),
      (p) => shown(p.flops_literature, (v) => figure(1e-9 * v)),
    ),
    {
      key: "tokens",
      minor: true,
      head: ["Tokens", "last block"],
      value: (p) => p.tokens.at(-1),
      cell: (p) =>
        lines(String(p.tokens[0] ?? ABSENT), p.tokens.at(-1) !== p.tokens[0] ? `→ ${p.tokens.at(-1)}` : ""),
    },
    ...(has("resolution")
      ? [
          {
            key: "resolution",
            minor: true,
            head: ["Picture", "px"],
            value: (p) => p.resolution?.[0],
            cell: (p) => [p.resolution ? p.resolution.join(" × ") : ""],
          },
        ]
      : []),
    ...METRICS.filter((metric) => has(metric.key)).map((metric) =>
      number(
        metric.key,
        [`${metric.name}, ${metric.unit}`, ""],
        metric.write,
        (p) => interval(p, metric),
      ),
    ),
    ...(has("speedup")
      ? [number("speedup", ["Speed", "× unreduced"], (v) => v.toFixed(2), (p) => interval(p, { key: "speedup" }, (v) => v.toFixed(2)))]
      : []),
    ...(has("img_per_s") ? [number("img_per_s", ["img/s", ""], figure)] : []),
    ...(has("latency_p50")
      ? [number("latency_p50", ["ms, p50", "p95"], figure, (p) => shown(p.latency_p95, figure))]
      : []),
    ...(has("peak_mib") ? [{ ...number("peak_mib", ["Peak MiB"], figure), minor: true }] : []),
    ...(new Set(points.map((p) => p.images)).size > 1 || points.some((p) => p.skipped.length)
      ? [number("images", ["Images"], String, (p) => (p.skipped.length ? `${p.skipped.length} skipped` : ""))]
      : []),
  ];
}

function drawRuns() {
  const shownRuns = data.runs.filter((run) => points.some((point) => point.runs.includes(run) && isVisible(point)));
  const get = (key, head, value, text = true) => ({
    key,
    head: [head],
    text,
    value,
    cell: (run) => [shown(value(run), String)],
  });
  return table(
    "runs",
    [
      get("name", "Run", (run) => run.name),
      get("backbone", "Backbone", (run) => run.result.backbone),
      get("dataset", "Dataset", (run) => run.result.dataset),
      get("weights", "Weights", (run) => run.result.weights?.sha256?.slice?.(0, 12) ?? run.result.weights?.source),
      get("hardware", "Hardware", (run) => run.hardware),
      get("torch", "PyTorch", (run) => run.result.environment.torch),
      get(
        "commit",
        "Commit",
        (run) =>
          run.result.environment.commit &&
          run.result.environment.commit.slice(0, 10) +
            (run.result.environment.commit.endsWith("-dirty") ? "-dirty" : ""),
      ),
      get("paired", "Predictions", (run) => (run.paired ? "yes" : "no")),
    ],
    shownRuns,
  );
}
