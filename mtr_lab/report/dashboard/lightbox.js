// A picture as large as the window; the same image under every policy with the arrow keys.

let gallery = [],
  place = 0;

/** All pictures in view: the same image under each policy, then the next image. */
function picturesInView() {
  const strongest = new Map();
  for (const point of visible)
    if (point.run.pictures.length && isDrawn(point)) strongest.set(point.run, point);
  const entries = [...strongest].flatMap(([run, point]) => run.pictures.map((picture, i) => ({ point, picture, i })));
  return entries.sort((a, b) => a.i - b.i || a.picture.name.localeCompare(b.picture.name) || a.point.policy.localeCompare(b.point.policy));
}

/** Whether a run's pictures are of this point, the one that removes the most. */
function isDrawn(point) {
  const most = Math.max(...point.run.result.points.map((other) => other.reduction ?? 0));
  return !point.unreduced && point.reduction === most;
}

function openLightbox(run, picture) {
  gallery = picturesInView();
  place = gallery.findIndex((entry) => entry.point.run === run && entry.picture === picture);
  if (place < 0) [gallery, place] = [[{ point: points.find((point) => point.run === run && isDrawn(point)), picture }], 0];
  byId("lightbox").showModal();
  turn(0);
}

function turn(step) {
  place = (place + step + gallery.length) % gallery.length;
  const { point, picture } = gallery[place];
  byId("lightbox").replaceChildren(
    h("div", { class: "bar" },
      h("span", {}, swatch(point.policy), ` ${label(point)} at ${ratioName(point)} · ${picture.name}`),
      h("span", { class: "actions" },
        h("button", { type: "button", "aria-label": "Previous picture", onclick: () => turn(-1) }, "←"),
        h("span", {}, `${place + 1} of ${gallery.length}`),
        h("button", { type: "button", "aria-label": "Next picture", onclick: () => turn(1) }, "→"),
        h("button", { type: "button", "aria-label": "Close the picture", onclick: () => byId("lightbox").close() }, "✕"),
      ),
    ),
    h("div", { class: "frame" },
      h("img", {
        src: picture.uri,
        alt: `${picture.name}, ${label(point)}`,
        title: "Click for full size",
        onclick: ({ target }) => target.classList.toggle("full"),
      }),
    ),
  );
}
