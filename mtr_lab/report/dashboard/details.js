// The panel with the details of one point.

/** Nested settings as [dotted key, value], as typed on the command line. */
function flatten(node, prefix = "") {
  if (node === null || typeof node !== "object" || Array.isArray(node) || !Object.keys(node).length) {
    return [[prefix, typeof node === "string" ? node : JSON.stringify(node)]];
  }
  return Object.entries(node).flatMap(([key, value]) => flatten(value, prefix ? `${prefix}.${key}` : key));
}

let returnTo = null;

function showDetails(id) {
  const point = points.find((candidate) => candidate.id === id);
  if (!point) return;
  if (byId("details").hidden) returnTo = document.activeElement;
  state.selected = id;
  const { run } = point;
  const settings = flatten(run.result.config);
  const list = h("div", {});
  const search = (text) => {
    const wanted = text.trim().toLowerCase();
    const kept = settings.filter(([key, value]) => `${key}=${value}`.toLowerCase().includes(wanted));
    list.replaceChildren(kept.length ? pairsTable(kept) : h("p", { class: "caption" }, "No setting matches."));
  };
  search("");
  const numbers = [
    ["asked", point.unreduced ? null : ratioName(point)],
    ["promised", point.budget ? shown(point.budget.promised, (v) => budgetFigure(point.budget, v)) : null],
    ["measured", point.budget ? shown(point.budget.measured, (v) => budgetFigure(point.budget, v)) : null],
    ["picture", picture(point) ?? null],
    ["FLOPs removed", shown(point.reduction, (v) => `${percent(v)} %`)],
    ["FLOPs, true", shown(point.flops_true, (v) => `${figure(1e-9 * v)} G`)],
    [
      "of these, for the reduction itself",
      point.unreduced ? null : shown(point.flops_overhead, (v) => `${figure(1e-6 * v)} M`),
    ],
    ["FLOPs, literature", shown(point.flops_literature, (v) => `${figure(1e-9 * v)} G`)],
    ...METRICS.filter((metric) => point[metric.key] != null).map((metric) => [
      metric.name,
      `${metric.write(point[metric.key])} ${metric.unit}${interval(point, metric) && ` (${interval(point, metric)})`}`,
    ]),
    [`${inputOf(point)}s`, `${grouped(point.images)}${point.skipped.length ? `, ${point.skipped.length} skipped` : ""}`],
    [
      `${inputOf(point)}s per second`,
      point.img_per_s == null
        ? "not measured"
        : figure(point.img_per_s),
    ],
    [
      "speed over the unreduced model",
      point.speedup == null || point.unreduced
        ? null
        : `× ${point.speedup.toFixed(2)}${interval(point, { key: "speedup", write: figure }) && ` (${interval(point, { key: "speedup", write: figure })})`}`,
    ],
    [
      `latency of one ${inputOf(point)}`,
      point.latency_p50 == null
        ? null
        : `${figure(point.latency_p50)} ms, 95th percentile ${shown(point.latency_p95, figure)} ms`,
    ],
    ["peak memory", point.peak_mib == null ? null : `${figure(point.peak_mib)} MiB`],
  ].filter(([, value]) => value != null);
  const speeds = point.runs
    .map((other) => other.result.points.find((p) => p.policy === "none")?.img_per_s)
    .filter((speed) => speed != null);
  const range = speeds.length ? `, at ${figure(Math.min(...speeds))} to ${figure(Math.max(...speeds))} img/s` : "";
  const repeated = point.seeds
    ? `Mean of the seeds ${point.seeds.join(", ")}, ± the standard deviation over them: runs ` +
      `${point.runs.map((other) => other.name).join(", ")}. Configuration and pictures are those of the first.`
    : point.runs.length > 1
      ? `${point.runs.length} runs have equal figures${range}; the median run is shown.`
      : null;
  const section = (title, ...children) => h("section", {}, h("h3", {}, title), ...children);
  byId("details").replaceChildren(
    h(
      "div",
      { class: "bar" },
      h(
        "h2",
        { id: "details-title", tabindex: "-1" },
        swatch(point.policy),
        label(point, [point]),
        point.unreduced ? "" : ` at ${ratioName(point)}`,
      ),
      h("button", { type: "button", class: "close", "aria-label": "Close", onclick: hideDetails }, "✕"),
    ),
    h(
      "p",
      { class: "caption" },
      `${run.name} · ${point.backbone} · ${point.task} · ${point.dataset} · ${point.hardware}`,
    ),
    repeated ? h("p", { class: "caption" }, repeated) : "",
    point.unreduced ? "" : section("Use it", code(patchCall(point)), code(command(point))),
    pairsTable(numbers),
    point.tokens.length
      ? section(
          "Tokens per block",
          tokensStrip(point.tokens, colour(point.policy, theme())),
          h("p", { class: "caption" }, point.tokens.join(", ")),
        )
      : "",
    run.pictures.length && isDrawn(point)
      ? section(
          "Pictures",
          ...run.pictures.map((picture) =>
            h(
              "figure",
              {},
              h(
                "button",
                { type: "button", class: "picture", "aria-label": `Enlarge ${picture.name}`, onclick: () => openLightbox(run, picture) },
                h("img", { src: picture.uri, alt: picture.name, loading: "lazy" }),
              ),
              h("figcaption", {}, picture.name),
            ),
          ),
        )
      : "",
    section(
      "Configuration",
      h("input", {
        type: "search",
        placeholder: `search ${settings.length} settings`,
        "aria-label": "Search the configuration",
        oninput: (event) => search(event.target.value),
      }),
      list,
    ),
    section("Environment", pairsTable(flatten(run.result.environment))),
    run.result.weights ? section("Weights", pairsTable(flatten(run.result.weights))) : "",
    point.skipped.length
      ? section(
          "Skipped files",
          h(
            "ul",
            {},
            point.skipped.map((file) => h("li", {}, file)),
          ),
        )
      : "",
  );
  byId("details").hidden = false;
  byId("details").scrollTop = 0;
  byId("details-title").focus({ preventScroll: true });
  render();
}

function hideDetails() {
  const opened = state.selected;
  state.selected = null;
  byId("details").hidden = true;
  render();
  // render() replaced the table, and with it the button that opened the panel.
  const again = returnTo?.isConnected
    ? returnTo
    : [...document.querySelectorAll(".opener")].find((node) => node.dataset.point === opened);
  again?.focus({ preventScroll: true });
}
