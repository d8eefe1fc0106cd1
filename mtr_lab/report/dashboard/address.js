// The view in the page's address, so that a link shows what its sender saw.

const CHOICES = ["task", "metric", "cost", "speed", "baseline", "theme", "search", "goal", "training"];

/** Write the view to the address. */
function remember() {
  const query = new URLSearchParams();
  for (const key of CHOICES) if (state[key] && state[key] !== untouched[key]) query.set(key, state[key]);
  for (const [facet, chosen] of Object.entries(state.chosen)) for (const value of chosen) query.append(`only.${facet}`, value);
  for (const [table, sort] of Object.entries(state.sort))
    if (sort) query.set(`sort.${table}`, (sort.direction < 0 ? "-" : "") + sort.key);
  for (const [key, limit] of Object.entries(state.limit)) if (key === limitKey()) query.set("limit", limit);
  if (state.selected) query.set("point", state.selected);
  const address = String(query);
  if (address !== location.hash.slice(1)) history.replaceState(null, "", `#${address}`);
}

/** Read the view from the address. */
function recall() {
  const query = new URLSearchParams(location.hash.slice(1));
  for (const key of CHOICES) if (query.get(key)) state[key] = query.get(key);
  if (!(state.goal in GOALS)) state.goal = untouched.goal;
  if (!["light", "dark"].includes(state.theme)) state.theme = null;
  for (const [kind, axes] of [["cost", COSTS], ["speed", SPEEDS]])
    if (!axes.some((axis) => axis.key === state[kind])) state[kind] = axes[0].key;
  for (const [name, value] of query) {
    const [kind, key] = [name.split(".")[0], name.slice(name.indexOf(".") + 1)];
    if (kind === "only") state.chosen[key]?.add(value);
    if (kind === "sort" && key in state.sort) state.sort[key] = { key: value.replace(/^-/, ""), direction: value.startsWith("-") ? -1 : 1 };
  }
  const limit = query.get("limit");
  if (limit && Number.isFinite(Number(limit))) state.limit[limitKey()] = Number(limit);
  state.selected = query.get("point");
}

const untouched = Object.freeze({ ...state });
