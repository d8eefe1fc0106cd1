"""Draw the rooms of the package (its subpackages) and their imports, computed from the code."""

from dataclasses import dataclass
from functools import cached_property

import grimp

PACKAGE, PROGRAMS, COMPOSITION, FOUNDATION = "mtr_lab", "programs", "composition", "foundation"
BOX, ROW, GAP, LANE, MARGIN = 230, 44, 12, 44, 8  # pixels
# Colours of mkdocs-material, light or dark.
INK, PAPER, ACCENT = "var(--md-default-fg-color)", "var(--md-code-bg-color)", "var(--md-primary-fg-color)"


@dataclass(frozen=True)
class Rooms:
    """The imports between rooms.

    A room is a subpackage. Modules outside subpackages are the ``composition`` if a subpackage imports them and they
    import one, ``programs`` if they import a subpackage, else the ``foundation``.
    """

    graph: grimp.ImportGraph

    @cached_property
    def room_of(self) -> dict[str, str]:
        """The room of each module."""
        subpackages = {m for m in self.graph.find_children(PACKAGE) if self.graph.find_children(m)}
        rooms = {}
        for module in self.graph.modules:
            top = ".".join(module.split(".")[:2])
            needs = {".".join(other.split(".")[:2]) for other in self.graph.find_upstream_modules(module)}
            rooms[module] = top.split(".")[1] if top in subpackages else PROGRAMS if needs & subpackages else FOUNDATION
        for module in [module for module, room in rooms.items() if room not in (PROGRAMS, FOUNDATION)]:
            for other in self.graph.find_upstream_modules(module):
                if rooms[other] == PROGRAMS:
                    rooms[other] = COMPOSITION
        return rooms

    @cached_property
    def imports(self) -> dict[tuple[str, str], int]:
        """The number of modules of one room that import another room, by (importer, imported)."""
        importers: dict[tuple[str, str], set[str]] = {}
        for module, room in self.room_of.items():
            for other in self.graph.find_modules_directly_imported_by(module):
                if self.room_of[other] != room:
                    importers.setdefault((room, self.room_of[other]), set()).add(module)
        return {pair: len(modules) for pair, modules in importers.items()}

    @cached_property
    def order(self) -> list[str]:
        """From the programs to the foundation, each room below those that import it."""
        rows: dict[str, int] = {}

        def row(room: str) -> int:
            if room not in rows:
                rows[room] = max((row(a) + 1 for a, b in self.imports if b == room), default=0)
            return rows[room]

        return sorted(set(self.room_of.values()), key=lambda room: (row(room), room))

    def size(self, room: str) -> int:
        """The number of modules of a room."""
        return list(self.room_of.values()).count(room)


def draw() -> str:
    """The picture as an inline SVG, in the colours of the page around it."""
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    for module in graph.find_modules_that_directly_import(PACKAGE):
        graph.remove_import(importer=module, imported=PACKAGE)  # it has the version, and imports at first use
    rooms = Rooms(graph)
    order = rooms.order
    top = {room: MARGIN + i * (ROW + GAP) for i, room in enumerate(order)}
    lane = {room: BOX + LANE * i for i, room in enumerate(order) if i}  # lower rooms further out: arrows do not cross
    width, height = max(lane.values()) + MARGIN, top[order[-1]] + ROW + MARGIN
    shapes, dots = [], []
    for room in order:
        importers = [a for a in order if (a, room) in rooms.imports]
        if importers:
            x, start, end = lane[room], top[importers[0]] + 15, top[room] + ROW - 13
            shapes.append(f'<path class="arrow" d="M{x} {start}V{end}H{BOX + 1}" marker-end="url(#head)"/>')
        for importer in importers:
            count = rooms.imports[importer, room]
            label = f"{importer} imports {room} ({count} module{'s' * (count > 1)})"
            dots.append(f'<circle cx="{lane[room]}" cy="{top[importer] + 15}" r="4"><title>{label}</title></circle>')
        imported = [b for b in order if (room, b) in rooms.imports]
        if imported:
            shapes.append(f'<path class="wire" d="M{BOX} {top[room] + 15}H{lane[imported[-1]]}"/>')
        shapes.append(
            f'<rect x="1" y="{top[room]}" width="{BOX - 1}" height="{ROW}" rx="6"/>'
            f'<text x="14" y="{top[room] + 27}">{room}</text>'
            f'<text class="size" x="{BOX - 12}" y="{top[room] + 27}">{rooms.size(room)} modules</text>'
        )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img"
 aria-label="The rooms of the package and what they import">
<style>
.rooms svg {{ max-width: 100%; height: auto }}
.rooms rect {{ fill: {PAPER}; stroke: {ACCENT}; stroke-width: 1.5 }}
.rooms text {{ fill: {INK}; font: 600 15px system-ui, sans-serif }}
.rooms .size {{ font-weight: 400; font-size: 12px; text-anchor: end; opacity: .7 }}
.rooms path {{ fill: none }}
.rooms .arrow {{ stroke: {ACCENT}; stroke-width: 1.5 }}
.rooms .wire {{ stroke: {INK}; stroke-width: 1; opacity: .35 }}
.rooms circle, .rooms marker path {{ fill: {ACCENT} }}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4L0 8Z"/></marker></defs>
{"".join(shapes + dots)}
</svg>"""
