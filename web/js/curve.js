/** One meter: its name, its newest value and a small curve. */

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 100;
const HEIGHT = 28;

const shown = (value) => (value >= 10 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toFixed(3));

export class Curve {
  constructor(name, title, hint, spoken) {
    this.name = name;
    this.title = title;
    this.spoken = spoken;
    this.element = document.createElement("div");
    this.element.className = "adastate-meter";
    this.element.dataset.meter = name;
    this.element.title = hint;
    this.element.setAttribute("role", "img");
    const head = document.createElement("div");
    head.className = "adastate-meter-head";
    const label = document.createElement("span");
    label.textContent = title;
    this.value = document.createElement("span");
    this.value.className = "adastate-meter-value";
    head.append(label, this.value);
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    this.line = document.createElementNS(SVG, "polyline");
    this.mark = document.createElementNS(SVG, "line");
    this.mark.setAttribute("class", "adastate-meter-mark");
    this.mark.setAttribute("y1", "0");
    this.mark.setAttribute("y2", String(HEIGHT));
    svg.append(this.mark, this.line);
    this.element.append(head, svg);
  }

  /** `points` are [position in 0..1, value]; `at` marks a position, `value` is written beside the name. */
  draw(points, at, value) {
    const highest = Math.max(1e-6, ...points.map(([, v]) => v));
    const y = (v) => HEIGHT - 2 - (HEIGHT - 4) * (v / highest);
    this.line.setAttribute("points", points.map(([x, v]) => `${(WIDTH * x).toFixed(2)},${y(v).toFixed(2)}`).join(" "));
    this.mark.style.display = at === null ? "none" : "";
    if (at !== null) for (const end of ["x1", "x2"]) this.mark.setAttribute(end, (WIDTH * at).toFixed(2));
    this.value.textContent = value === null ? "" : shown(value);
    this.element.setAttribute("aria-label", this.spoken(this.title, this.value.textContent || "–"));
  }
}
