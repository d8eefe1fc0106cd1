// The choices above the charts.

function buildFilters() {
  const focused = document.activeElement?.dataset?.chip;
  byId("facets").replaceChildren(
    taskChoice(),
    ...FACETS.filter((facet) => facet.values.length).map((facet) => {
      const chips = facet.values.map((value) =>
        facet.values.length === 1
          ? h("span", { class: "chip only" }, facet.key === "policy" ? swatch(value) : null, value)
          : h(
              "button",
              {
                type: "button",
                class: "chip",
                "data-chip": `${facet.key}=${value}`,
                "aria-pressed": String(state.chosen[facet.key].has(value)),
                onclick: (event) => {
                  const chosen = state.chosen[facet.key];
                  if (!chosen.delete(value)) chosen.add(value);
                  event.currentTarget.setAttribute("aria-pressed", String(chosen.has(value)));
                  render();
                },
              },
              facet.key === "policy" ? swatch(value) : null,
              value,
            ),
      );
      return h("fieldset", { "data-facet": facet.key }, h("legend", {}, facet.name), chips);
    }),
  );
  if (focused) document.querySelector(`[data-chip="${CSS.escape(focused)}"]`)?.focus();
}

/** The tasks are sections of the page, one in view. */
function taskChoice() {
  const tasks = tasksNow();
  return h(
    "fieldset",
    { "data-facet": "task" },
    h("legend", {}, "Task"),
    tasks.map((task) =>
      tasks.length === 1
        ? h("span", { class: "chip only" }, task)
        : h(
            "button",
            {
              type: "button",
              class: "chip",
              "data-chip": `task=${task}`,
              "aria-pressed": String(task === state.task),
              onclick: () => {
                state.task = task;
                enter();
                drawPage();
              },
            },
            task,
          ),
    ),
  );
}

function buildMetrics() {
  const present = METRICS.filter((metric) => visible.some((point) => point[metric.key] != null));
  if (!present.some((metric) => metric.key === state.metric)) state.metric = (present[0] ?? METRICS[0]).key;
  const drawn = [...byId("metrics").querySelectorAll("input")].map((input) => input.value);
  if (drawn.join() === present.map((metric) => metric.key).join()) return;
  byId("metrics").replaceChildren(
    h("legend", {}, "Quality"),
    ...present.map((metric) =>
      h(
        "label",
        {},
        h("input", {
          type: "radio",
          name: "metric",
          value: metric.key,
          checked: metric.key === state.metric,
          onchange: () => {
            state.metric = metric.key;
            render();
          },
        }),
        h("span", {}, metric.name),
      ),
    ),
  );
}
