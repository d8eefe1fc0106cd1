// Elements of the page.

const byId = (id) => document.getElementById(id);
const live = document.documentElement.dataset.live === "true";
const dark = matchMedia("(prefers-color-scheme: dark)");
const print = matchMedia("print");

/** The text of a block of the page, which is compressed by gzip, in base64. */
async function unpacked(id) {
  const packed = atob(byId(id).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const lines = (first, second) => [h("span", {}, first), second ? h("small", {}, second) : null];

function pairsTable(rows) {
  return h(
    "table",
    { class: "pairs" },
    h(
      "tbody",
      {},
      rows.map(([key, value]) => h("tr", {}, h("th", { scope: "row" }, key), h("td", {}, value))),
    ),
  );
}
