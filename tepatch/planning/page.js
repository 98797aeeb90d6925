"use strict";

// The page of a plan. All text goes in as text (never as markup), and all geometry is computed from the same offsets,
// sizes and strides that a load uses.

const PALETTE = ["#4c9ed9", "#e69f00", "#2bae82", "#cc79a7", "#d55e00", "#8c7ae6", "#b5a800", "#3fbfc9"];
const MAX_LISTED = 300;
const MAX_LEGEND = 40;
const MARGIN = { left: 64, top: 22, right: 24, bottom: 10 };

const raw = JSON.parse(document.getElementById("plan").textContent);
const byId = (id) => document.getElementById(id);

// ---- the plan ----

function decode() {
  const sources = raw.sources.map(([name, shape, dtype, state, note]) => ({
    side: "source", name, shape: raw.shapes[shape], dtype: raw.texts[dtype], state: raw.texts[state],
    note: raw.texts[note], copies: [], fills: [],
  }));
  const targets = raw.targets.map(([name, shape, dtype, state, rule, tied]) => ({
    side: "target", name, shape: raw.shapes[shape], dtype: raw.texts[dtype], state: raw.texts[state], rule,
    tied: tied === undefined ? null : tied, copies: [], fills: [],
  }));
  raw.copies.forEach(([source, target], index) => {
    sources[source].copies.push(index);
    targets[target].copies.push(index);
  });
  raw.fills.forEach(([target], index) => targets[target].fills.push(index));
  const byName = (list) => new Map(list.map((entry) => [entry.name, entry]));
  const plan = { sources, targets, sourceNames: byName(sources), targetNames: byName(targets), inexact: new Map() };
  raw.inexact.forEach(([reason, list]) => list.forEach((index) => plan.inexact.set(sources[index].name, reason)));
  return plan;
}

const product = (sizes) => sizes.reduce((all, size) => all * size, 1);

/** One tensor, as the side of all pairs that lie in it: what is at each of its elements. */
class Look {
  constructor(plan, entry) {
    this.entry = entry;
    const shape = entry.shape;
    this.cols = shape.length ? shape[shape.length - 1] : 1;
    this.rows = shape.length > 1 ? shape[shape.length - 2] : 1;
    this.lead = shape.slice(0, -2);
    this.slabs = product(this.lead);
    this.numel = product(shape);
    this.isTarget = entry.side === "target";
    this.parts = entry.copies.map((index) => this.copyPart(plan, raw.copies[index]));
    entry.fills.forEach((index) => this.parts.push(this.fillPart(raw.fills[index])));
    this.last = null;
  }

  copyPart(plan, [source, target, layout, words, scale, offset]) {
    const [sizes, sourceStrides, targetStrides, sourceOffset, targetOffset] = raw.layouts[layout];
    const other = this.isTarget ? plan.sources[source] : plan.targets[target];
    const [inSource, inTarget, order] = raw.words[words];
    const [here, there] = this.isTarget ? [targetStrides, sourceStrides] : [sourceStrides, targetStrides];
    return this.part(sizes, here, there, this.isTarget ? targetOffset : sourceOffset, {
      other, otherOffset: this.isTarget ? sourceOffset : targetOffset, otherNumel: product(other.shape),
      here: this.isTarget ? inTarget : inSource, there: this.isTarget ? inSource : inTarget, order,
      affine: scale === undefined ? null : [scale, offset],
    });
  }

  fillPart([, layout, place, value]) {
    const [sizes, , targetStrides, , targetOffset] = raw.layouts[layout];
    const more = { other: null, here: raw.texts[place], constant: raw.texts[value] };
    return this.part(sizes, targetStrides, targetStrides, targetOffset, more);
  }

  part(sizes, here, there, offset, more) {
    const atoms = sizes.map((size, i) => ({ size, stride: here[i], other: there[i], tail: 0 }));
    const used = atoms.filter((atom) => atom.size !== 1).sort((a, b) => b.stride - a.stride);
    let reach = 0;
    for (const atom of [...used].reverse()) {
      atom.tail = reach; // how far the inner atoms go
      reach += (atom.size - 1) * atom.stride;
    }
    return { atoms: used, isEmpty: used.some((a) => a.size === 0), first: offset, last: offset + reach, ...more };
  }

  /** The part that holds the element at a flat index, and the flat index at its other end; null if there is none. */
  locate(flat) {
    if (this.last !== null) {
      const found = inPart(this.last, flat);
      if (found >= 0) return { part: this.last, flat: found };
    }
    for (const part of this.parts) {
      const found = inPart(part, flat);
      if (found >= 0) {
        this.last = part;
        return { part, flat: found };
      }
    }
    return null;
  }

  /** Parts with an element in one slab (the last two dimensions, for fixed others). */
  partsIn(slab) {
    const size = this.rows * this.cols;
    return this.parts.filter((part) => !part.isEmpty && touches(part, slab * size, (slab + 1) * size));
  }

  flat(slab, row, col) {
    return (slab * this.rows + row) * this.cols + col;
  }

  /** The shortest runs of rows and of columns that belong together on both sides, and how often they come again. */
  stripes(slab) {
    const out = { row: this.rows, rowPeriod: 1, col: this.cols, colPeriod: 1 };
    const parts = this.partsIn(slab);
    for (const part of parts) {
      if (part.atoms.length < 2 && parts.length < 2) continue;
      const across = part.atoms.filter((a) => a.stride >= this.cols && a.stride < this.cols * this.rows);
      const along = part.atoms.filter((a) => a.stride < this.cols);
      const inner = across[across.length - 1];
      let run = inner && inner.stride === this.cols ? inner.size : 1;
      along.forEach((a) => { run = Math.max(run, Math.floor((a.size * a.stride) / this.cols)); });
      if (run < this.rows && this.rows > 1) {
        out.row = Math.min(out.row, run);
        out.rowPeriod = Math.max(out.rowPeriod, periodOf(across, this.cols));
      }
      const step = along[along.length - 1];
      const length = step && step.stride === 1 ? Math.min(step.size, this.cols) : 1;
      if (length < this.cols) {
        out.col = Math.min(out.col, length);
        out.colPeriod = Math.max(out.colPeriod, periodOf(along, 1));
      }
    }
    out.rowPeriod = Math.min(this.rows, Math.max(out.rowPeriod, out.row));
    out.colPeriod = Math.min(this.cols, Math.max(out.colPeriod, out.col));
    return out;
  }
}

/** After how many rows (or columns, for a unit of 1) all that a part does begins again. */
const periodOf = (atoms, unit) => (atoms.length ? Math.ceil(atoms[0].stride / unit) : 1);

/** The flat index at the other end of a part's element; -1 if the part does not hold it. */
function inPart(part, flat) {
  if (part.isEmpty || flat < part.first || flat > part.last) return -1;
  const found = digits(part.atoms, 0, flat - part.first, 0);
  return found < 0 ? -1 : found + (part.otherOffset || 0);
}

function digits(atoms, depth, rest, other) {
  if (depth === atoms.length) return rest === 0 ? other : -1;
  const { size, stride, other: step, tail } = atoms[depth];
  // Views that were cut from a tensor leave one choice; the search is right for all others too.
  const low = Math.max(0, Math.ceil((rest - tail) / stride));
  for (let i = Math.min(size - 1, Math.floor(rest / stride)); i >= low; i--) {
    const found = digits(atoms, depth + 1, rest - i * stride, other + i * step);
    if (found >= 0) return found;
  }
  return -1;
}

/** Whether a part has an element from `from` to before `to`. */
function touches(part, from, to) {
  const search = (depth, low, high) => {
    if (depth === part.atoms.length) return low <= 0 && high > 0;
    const { size, stride, tail } = part.atoms[depth];
    const start = Math.max(0, Math.ceil((low - tail) / stride));
    for (let i = start; i <= Math.min(size - 1, Math.floor((high - 1) / stride)); i++) {
      if (search(depth + 1, low - i * stride, high - i * stride)) return true;
    }
    return false;
  };
  return search(0, from - part.first, to - part.first);
}

function unravel(flat, shape) {
  const out = new Array(shape.length);
  for (let dim = shape.length - 1; dim >= 0; dim--) {
    out[dim] = flat % shape[dim];
    flat = Math.floor(flat / shape[dim]);
  }
  return out;
}

// ---- small helpers for elements ----

function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties || {})) {
    if (key.includes("-") || key === "role" || key === "for" || key === "scope") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

/** A name that may be broken after its dots and underscores. */
function named(name, properties) {
  const out = make("span", properties);
  name.split(/(?<=[._/])/).forEach((piece, i) => out.append(...(i ? [make("wbr"), piece] : [piece])));
  return out;
}

const commas = (number) => number.toLocaleString("en-US");
const shapeText = (shape) => `[${shape.join(", ")}]`;
const plural = (count, word) => `${commas(count)} ${word}${count === 1 ? "" : "s"}`;

function bytesText(bytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let value = bytes, unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit++; }
  return unit === 0 ? plural(bytes, "byte") : `${value.toFixed(value < 10 ? 2 : 1)} ${units[unit]}`;
}

function hashOf(entry) {
  const plain = entry.side === "target" && !entry.name.startsWith("source:");
  const prefix = plain ? "" : entry.side === "target" ? "target:" : "source:";
  return "#" + prefix + encodeURIComponent(entry.name);
}

const linkTo = (entry, text) => make("a", { href: hashOf(entry) }, named(text || entry.name, { className: "mono" }));

function affineText([scale, offset]) {
  const times = scale === 1 ? "" : ` x ${scale}`;
  return times + (offset === 0 ? "" : offset < 0 ? ` - ${-offset}` : ` + ${offset}`);
}

// ---- the drawing ----

function rgbOf(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

/** A rectangle of rows and columns of one slab, drawn element by element. */
class Drawing {
  constructor(look, colours, settings, onPoint) {
    this.look = look;
    this.colours = colours;
    this.settings = settings;
    this.onPoint = onPoint;
    this.box = { r0: 0, r1: look.rows, c0: 0, c1: look.cols };
    this.point = null;
    this.ranges = new Map(); // what the shade goes over; the whole of the other tensor if it is not here
    this.canvas = make("canvas", { tabIndex: 0, role: "img" });
    this.listen();
  }

  listen() {
    const at = (event) => {
      const place = this.canvas.getBoundingClientRect();
      return this.elementAt(event.clientX - place.left, event.clientY - place.top);
    };
    let drag = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      drag = { x: event.clientX, y: event.clientY, box: { ...this.box } };
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (drag !== null && this.isZoomed()) {
        const { r0, r1, c0, c1 } = drag.box;
        const down = ((drag.y - event.clientY) / this.plot.height) * (r1 - r0);
        const right = ((drag.x - event.clientX) / this.plot.width) * (c1 - c0);
        this.moveTo({ r0: r0 + down, r1: r1 + down, c0: c0 + right, c1: c1 + right });
        return;
      }
      this.show(at(event));
    });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => { drag = null; });
    this.canvas.addEventListener("pointerleave", () => { if (drag === null) this.show(null); });
    this.canvas.addEventListener("dblclick", (event) => this.zoom(0.5, at(event)));
    this.canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return; // plain scrolling scrolls the page
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? 0.7 : 1 / 0.7, at(event));
    }, { passive: false });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const { r0, r1, c0, c1 } = this.box;
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key in steps) {
      const [down, right] = steps[event.key];
      const far = event.shiftKey ? 16 : 1;
      const from = this.point || { row: Math.floor(r0) - down * far, col: Math.floor(c0) - right * far };
      const row = Math.min(this.look.rows - 1, Math.max(0, from.row + down * far));
      const col = Math.min(this.look.cols - 1, Math.max(0, from.col + right * far));
      const up = row < r0 ? row - r0 : row + 1 > r1 ? row + 1 - r1 : 0;
      const side = col < c0 ? col - c0 : col + 1 > c1 ? col + 1 - c1 : 0;
      if (up || side) this.moveTo({ r0: r0 + up, r1: r1 + up, c0: c0 + side, c1: c1 + side });
      this.show({ row, col });
    } else if (event.key === "+" || event.key === "=") this.zoom(0.5, this.point);
    else if (event.key === "-") this.zoom(2, this.point);
    else if (event.key === "0") this.whole();
    else return;
    event.preventDefault();
  }

  isZoomed() {
    const { r0, r1, c0, c1 } = this.box;
    return r1 - r0 < this.look.rows || c1 - c0 < this.look.cols;
  }

  whole() {
    this.moveTo({ r0: 0, r1: this.look.rows, c0: 0, c1: this.look.cols });
  }

  zoom(factor, around) {
    const { r0, r1, c0, c1 } = this.box;
    const axis = (low, high, limit, centre) => {
      const size = Math.min(limit, Math.max(Math.min(limit, 4), (high - low) * factor));
      const share = (centre - low) / (high - low);
      return [centre - share * size, centre + (1 - share) * size];
    };
    const rows = axis(r0, r1, this.look.rows, around ? around.row + 0.5 : (r0 + r1) / 2);
    const cols = axis(c0, c1, this.look.cols, around ? around.col + 0.5 : (c0 + c1) / 2);
    this.moveTo({ r0: rows[0], r1: rows[1], c0: cols[0], c1: cols[1] });
  }

  moveTo({ r0, r1, c0, c1 }) {
    const inside = (low, high, limit) => {
      const size = Math.min(high - low, limit);
      const start = Math.min(Math.max(0, low), limit - size);
      return [start, start + size];
    };
    [r0, r1] = inside(r0, r1, this.look.rows);
    [c0, c1] = inside(c0, c1, this.look.cols);
    this.box = { r0, r1, c0, c1 };
    this.draw();
    if (this.onMove) this.onMove();
  }

  show(point) {
    this.point = point;
    this.onPoint(point, this);
    this.drawOver();
  }

  elementAt(x, y) {
    const { r0, r1, c0, c1 } = this.box;
    const row = Math.floor(r0 + ((y - MARGIN.top) / this.plot.height) * (r1 - r0));
    const col = Math.floor(c0 + ((x - MARGIN.left) / this.plot.width) * (c1 - c0));
    const inside = row >= Math.floor(r0) && row < r1 && col >= Math.floor(c0) && col < c1;
    return inside ? { row, col } : null;
  }

  /** Where the middle of an element is drawn, in CSS pixels from the canvas's corner. */
  placeOf(row, col) {
    const { r0, r1, c0, c1 } = this.box;
    return {
      x: MARGIN.left + ((col + 0.5 - c0) / (c1 - c0)) * this.plot.width,
      y: MARGIN.top + ((row + 0.5 - r0) / (r1 - r0)) * this.plot.height,
    };
  }

  /** Let the shade go over what is seen, and no further: in a few rows of many, all would look alike. */
  shadeWhatIsSeen() {
    this.ranges.clear();
    const { r0, r1, c0, c1 } = this.box;
    const step = Math.max(1, Math.ceil(Math.sqrt(((r1 - r0) * (c1 - c0)) / 1e5)));
    for (let row = r0; row < r1; row++) {
      for (let col = c0; col < c1; col += col + 1 < c1 ? Math.min(step, c1 - 1 - col) : 1) {
        const found = this.look.locate(this.look.flat(this.settings.slab, row, col));
        if (found === null || found.part.other === null) continue;
        const range = this.ranges.get(found.part.other) || [Infinity, -Infinity];
        this.ranges.set(found.part.other, [Math.min(range[0], found.flat), Math.max(range[1], found.flat + 1)]);
      }
    }
  }

  /** The colour of one element, [r, g, b]; constants are hatched by the place they are drawn at. */
  colourAt(flat, x, y) {
    const found = this.look.locate(flat);
    if (found === null) return this.settings.theme.blank;
    if (found.part.other === null) {
      return (x + y) % 7 < 2 ? this.settings.theme.hatch : this.settings.theme.constant;
    }
    const [r, g, b] = this.colours.get(found.part.other) || this.settings.theme.blank;
    if (!this.settings.shade) return [r, g, b];
    // From pale at the other tensor's first element to full at its last: so an order can be seen.
    const [first, last] = this.ranges.get(found.part.other) || [0, found.part.otherNumel];
    const pale = 0.55 * (1 - (found.flat + 0.5 - first) / (last - first));
    return [r + (255 - r) * pale, g + (255 - g) * pale, b + (255 - b) * pale];
  }

  /** Whether there are stripes thinner than a pixel. */
  thin() {
    const { r0, r1, c0, c1 } = this.box;
    const stripes = this.look.stripes(this.settings.slab);
    return {
      rows: (stripes.row / (r1 - r0)) * this.plot.height < 1.5,
      cols: (stripes.col / (c1 - c0)) * this.plot.width < 1.5,
      stripes,
    };
  }

  measure() {
    const width = Math.max(200, this.canvas.clientWidth || 600) - MARGIN.left - MARGIN.right;
    const { r0, r1, c0, c1 } = this.box;
    const rows = r1 - r0, cols = c1 - c0;
    // True proportions as far as they can be read.
    const height = this.look.entry.shape.length < 2 ? 56 : Math.min(420, Math.max(64, (width * rows) / cols));
    this.plot = { width: Math.round(width), height: Math.round(this.fixedHeight || height) };
    if (!this.fixedHeight) this.fixedHeight = this.plot.height; // zooming does not move what is below
  }

  draw() {
    this.measure();
    const scale = Math.min(2, window.devicePixelRatio || 1);
    const { width, height } = this.plot;
    this.canvas.width = Math.round((width + MARGIN.left + MARGIN.right) * scale);
    this.canvas.height = Math.round((height + MARGIN.top + MARGIN.bottom) * scale);
    this.canvas.style.height = `${height + MARGIN.top + MARGIN.bottom}px`;
    const context = this.canvas.getContext("2d", { willReadFrequently: true });
    if (this.look.numel > 0) {
      const thin = this.thin();
      this.isThin = thin;
      this.isMixed = thin.rows || thin.cols;
      this.most = thin.rows && thin.cols ? 12 : 128;
      context.putImageData(this.pixels(scale), Math.round(MARGIN.left * scale), Math.round(MARGIN.top * scale));
    }
    context.setTransform(scale, 0, 0, scale, 0, 0);
    this.cells(context);
    this.axes(context);
    this.picture = context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    this.drawOver();
  }

  pixels(scale) {
    const width = Math.round(this.plot.width * scale), height = Math.round(this.plot.height * scale);
    const image = new ImageData(width, height);
    const step = this.isMixed ? Math.round(3 * scale) : 1;
    for (let y = 0; y < height; y += step) {
      for (let x = 0; x < width; x += step) {
        const colour = this.isMixed ? this.mixed(x, y, step, width, height) : this.single(x, y, width, height);
        for (let dy = 0; dy < step && y + dy < height; dy++) {
          for (let dx = 0; dx < step && x + dx < width; dx++) {
            const at = 4 * ((y + dy) * width + x + dx);
            [image.data[at], image.data[at + 1], image.data[at + 2]] = colour;
            image.data[at + 3] = 255;
          }
        }
      }
    }
    return image;
  }

  single(x, y, width, height) {
    const { r0, r1, c0, c1 } = this.box;
    const row = Math.min(this.look.rows - 1, Math.floor(r0 + ((y + 0.5) / height) * (r1 - r0)));
    const col = Math.min(this.look.cols - 1, Math.floor(c0 + ((x + 0.5) / width) * (c1 - c0)));
    return this.colourAt(this.look.flat(this.settings.slab, row, col), x, y);
  }

  /** The mean colour of elements below a block of pixels: all of them, or some that are spread evenly. */
  mixed(x, y, step, width, height) {
    const { r0, r1, c0, c1 } = this.box;
    const span = (from, size, all, low, high, isThin) => {
      const start = Math.floor(low + (from / all) * (high - low));
      const end = Math.min(high, Math.max(start + 1, Math.floor(low + ((from + size) / all) * (high - low))));
      if (!isThin) return [Math.floor((start + end) / 2)];
      if (end - start <= this.most) return Array.from({ length: Math.ceil(end - start) }, (_, i) => start + i);
      // Off the beat, so that a regular layout is not met at the same place each time.
      const jitter = (i) => ((from * 7 + i * 13 + 5) * 0.6180339887) % 1;
      return Array.from({ length: 48 }, (_, i) => Math.floor(start + ((i + jitter(i)) / 48) * (end - start)));
    };
    const rows = span(y, step, height, r0, r1, this.isThin.rows), cols = span(x, step, width, c0, c1, this.isThin.cols);
    const sum = [0, 0, 0];
    for (const row of rows) {
      for (const col of cols) {
        const colour = this.colourAt(this.look.flat(this.settings.slab, row, col), x, y);
        for (let i = 0; i < 3; i++) sum[i] += colour[i];
      }
    }
    return sum.map((value) => value / (rows.length * cols.length));
  }

  /** Lines between elements, and what each is, where there is room. */
  cells(context) {
    const { r0, r1, c0, c1 } = this.box;
    const { width, height } = this.plot;
    const cell = { width: width / (c1 - c0), height: height / (r1 - r0) };
    context.save();
    context.beginPath();
    context.rect(MARGIN.left, MARGIN.top, width, height);
    context.clip();
    context.strokeStyle = "rgba(0, 0, 0, 0.22)";
    context.lineWidth = 1;
    context.beginPath();
    if (cell.height >= 7) {
      for (let row = Math.ceil(r0); row <= r1; row++) {
        const y = Math.round(MARGIN.top + (row - r0) * cell.height) + 0.5;
        context.moveTo(MARGIN.left, y);
        context.lineTo(MARGIN.left + width, y);
      }
    }
    if (cell.width >= 7) {
      for (let col = Math.ceil(c0); col <= c1; col++) {
        const x = Math.round(MARGIN.left + (col - c0) * cell.width) + 0.5;
        context.moveTo(x, MARGIN.top);
        context.lineTo(x, MARGIN.top + height);
      }
    }
    context.stroke();
    if (cell.width >= 30 && cell.height >= 15) {
      context.font = "11px " + this.settings.theme.mono;
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.fillStyle = "#1f2328";
      for (let row = Math.floor(r0); row < r1; row++) {
        for (let col = Math.floor(c0); col < c1; col++) {
          const found = this.look.locate(this.look.flat(this.settings.slab, row, col));
          if (found === null || found.part.other === null) continue;
          const text = unravel(found.flat, found.part.other.shape).join(",");
          const place = this.placeOf(row, col);
          if (context.measureText(text).width < cell.width - 4) context.fillText(text, place.x, place.y);
        }
      }
    }
    context.restore();
  }

  axes(context) {
    const { r0, r1, c0, c1 } = this.box;
    const { width, height } = this.plot;
    context.font = "11px " + this.settings.theme.mono;
    context.fillStyle = this.settings.theme.faint;
    context.strokeStyle = this.settings.theme.faint;
    context.strokeRect(MARGIN.left - 0.5, MARGIN.top - 0.5, width + 1, height + 1);
    if (this.look.numel === 0) {
      context.fillText("no elements", MARGIN.left + 8, MARGIN.top + height / 2);
      return;
    }
    context.textAlign = "right";
    context.textBaseline = "middle";
    const rowEdges = this.look.entry.shape.length < 2 ? [] : this.edges("row");
    for (const edge of spaced(rowEdges, (row) => ((row - r0) / (r1 - r0)) * height, 13)) {
      const y = MARGIN.top + ((edge - r0) / (r1 - r0)) * height;
      context.fillText(commas(edge), MARGIN.left - 8, y);
      context.fillRect(MARGIN.left - 5, Math.round(y) - 0.5, 5, 1);
    }
    context.textAlign = "center";
    context.textBaseline = "bottom";
    for (const edge of spaced(this.edges("col"), (col) => ((col - c0) / (c1 - c0)) * width, 54)) {
      const x = MARGIN.left + ((edge - c0) / (c1 - c0)) * width;
      context.fillText(commas(edge), x, MARGIN.top - 6);
      context.fillRect(Math.round(x) - 0.5, MARGIN.top - 5, 1, 5);
    }
  }

  /** Ends of an axis, and where along its first and middle line another part begins. */
  edges(axis) {
    const { r0, r1, c0, c1 } = this.box;
    const [low, high] = axis === "row" ? [Math.ceil(r0), Math.floor(r1)] : [Math.ceil(c0), Math.floor(c1)];
    const out = new Set([low, high]);
    if (this.isMixed) return [...out];
    const pixels = axis === "row" ? this.plot.height : this.plot.width;
    const across = axis === "row" ? [c0, (c0 + c1) / 2] : [r0, (r0 + r1) / 2];
    for (const line of across.map(Math.floor)) {
      const at = (i) => {
        const found = this.look.locate(axis === "row"
          ? this.look.flat(this.settings.slab, i, line) : this.look.flat(this.settings.slab, line, i));
        return found && found.part;
      };
      let from = low;
      for (let i = 1; i <= pixels && out.size < 400; i++) {
        const to = Math.min(high - 1, low + Math.floor((i / pixels) * (high - low)));
        if (to > from && at(from) !== at(to)) {
          let [before, after] = [from, to];
          while (after - before > 1) {
            const middle = Math.floor((before + after) / 2);
            if (at(middle) === at(from)) before = middle;
            else after = middle;
          }
          out.add(after);
        }
        from = Math.max(from, to);
      }
    }
    return [...out];
  }

  /** The mark of the element that is pointed at, over the picture as it was drawn. */
  drawOver() {
    if (!this.picture) return;
    const context = this.canvas.getContext("2d", { willReadFrequently: true });
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.putImageData(this.picture, 0, 0);
    context.restore();
    const { r0, r1, c0, c1 } = this.box;
    if (this.point === null || this.point.row < Math.floor(r0) || this.point.row >= r1) return;
    if (this.point.col < Math.floor(c0) || this.point.col >= c1) return;
    const width = Math.max(5, this.plot.width / (c1 - c0)), height = Math.max(5, this.plot.height / (r1 - r0));
    const { x, y } = this.placeOf(this.point.row, this.point.col);
    for (const [colour, line] of [["#ffffff", 4], ["#000000", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.strokeRect(x - width / 2, y - height / 2, width, height);
    }
  }
}

/** Labels that do not run into each other; the ends first. */
function spaced(values, place, distance) {
  if (!values.length) return [];
  const sorted = [...values].sort((a, b) => a - b);
  const taken = [];
  for (const value of [sorted[0], sorted[sorted.length - 1], ...sorted.slice(1, -1)]) {
    if (taken.every((other) => Math.abs(place(other) - place(value)) >= distance)) taken.push(value);
  }
  return taken;
}

// ---- the page ----

const plan = decode();
const state = { side: "target", shade: true, entry: null, detail: null };

function theme() {
  const style = getComputedStyle(document.documentElement);
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  return {
    faint: style.getPropertyValue("--faint").trim(), mono: style.getPropertyValue("--mono").trim(),
    blank: isDark ? [20, 23, 27] : [255, 255, 255],
    constant: isDark ? [62, 69, 77] : [236, 239, 242], hatch: isDark ? [110, 119, 129] : [190, 198, 206],
  };
}

/** A name without its numbers: layers and experts that have it in common. */
const patternOf = (name) => name.replace(/(^|\.)\d+(?=\.|$)/g, "$1*");
const numbersOf = (name) => (name.match(/(?:^|(?<=\.))\d+(?=\.|$)/g) || []).map(Number);

function foldNumbers(numbers) {
  const sorted = [...new Set(numbers)].sort((a, b) => a - b);
  const out = [];
  for (let start = 0, i = 0; i < sorted.length; i++) {
    if (i + 1 === sorted.length || sorted[i + 1] !== sorted[i] + 1) {
      out.push(start === i ? `${sorted[i]}` : `${sorted[start]}..${sorted[i]}`);
      start = i + 1;
    }
  }
  return out.join(",");
}

function groupsOf(entries) {
  const groups = new Map();
  for (const entry of entries) {
    // Layers of another shape or state are a group of their own.
    const key = [patternOf(entry.name), entry.shape, entry.state, entry.rule].join("|");
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(entry);
  }
  return [...groups.values()].map((members) => {
    const columns = numbersOf(members[0].name).map((_, i) => members.map((each) => numbersOf(each.name)[i]));
    let at = 0;
    const title = patternOf(members[0].name).replace(/(?:^|(?<=\.))\*(?=\.|$)/g, () => {
      const folded = foldNumbers(columns[at++]);
      return /^\d+$/.test(folded) ? folded : `{${folded}}`;
    });
    return { members, columns, title };
  });
}

const groups = { target: groupsOf(plan.targets), source: groupsOf(plan.sources) };
const groupOf = new Map();
for (const side of ["target", "source"]) {
  groups[side].forEach((group) => group.members.forEach((entry) => groupOf.set(entry, group)));
}

function listItem(entry, title, note) {
  const link = make("a", { href: hashOf(entry) }, named(title), make("span", { className: "count" }, note));
  if (state.entry !== null && (entry === state.entry || (title !== entry.name && groupOf.get(state.entry) === groupOf.get(entry)))) {
    link.setAttribute("aria-current", "true");
  }
  return make("li", {}, link);
}

function showList() {
  const entries = state.side === "target" ? plan.targets : plan.sources;
  for (const side of ["target", "source"]) {
    byId(`tab-${side}s`).setAttribute("aria-pressed", String(side === state.side));
  }
  byId("tab-targets").textContent = `Parameters (${commas(plan.targets.length)})`;
  byId("tab-sources").textContent = `Checkpoint (${commas(plan.sources.length)})`;
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let items;
  if (words.length) {
    const matches = entries.filter((entry) => words.every((word) => entry.name.toLowerCase().includes(word)));
    const more = matches.length > MAX_LISTED ? `, the first ${MAX_LISTED} are listed` : "";
    byId("found").textContent = `${commas(matches.length)} of ${commas(entries.length)}${more}`;
    items = matches.slice(0, MAX_LISTED).map((entry) => listItem(entry, entry.name, shapeText(entry.shape)));
  } else {
    const list = groups[state.side];
    const more = list.length > MAX_LISTED ? `, the first ${MAX_LISTED} are listed` : "";
    byId("found").textContent = `${plural(entries.length, "name")} in ${plural(list.length, "group")}${more}`;
    items = list.slice(0, MAX_LISTED).map(({ members, title }) => {
      const chosen = state.entry !== null && members.includes(state.entry) ? state.entry : members[0];
      return listItem(chosen, title, members.length > 1 ? `x ${commas(members.length)}` : "");
    });
  }
  byId("list").replaceChildren(...items);
}

function table(heads, rows) {
  const head = heads.some(Boolean) ? [make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)))] : [];
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, ...[cell].flat()))));
  return make("div", { className: "scroll" }, make("table", {}, make("thead", {}, ...head), make("tbody", {}, ...body)));
}

const code = (text) => make("code", {}, text);

function counted(entries) {
  const counts = new Map();
  entries.forEach((entry) => counts.set(entry.state, (counts.get(entry.state) || 0) + 1));
  return [...counts].map(([word, count]) => `${commas(count)} ${word}`).join(", ") || "none";
}

function overview() {
  const main = byId("main");
  const rule = ([where, target, ruleState, count, sources], index) => {
    const first = plan.targets.find((entry) => entry.rule === index);
    const name = first ? linkTo(first, target) : named(target, { className: "mono" });
    const made = sources.length ? sources.map((each) => make("div", {}, named(each, { className: "mono" }))) : ["-"];
    const place = make("span", { className: "mono whole" }, where);
    return [name, made, ruleState === "off" ? "off (its condition does not hold)" : ruleState, commas(count), place];
  };
  const facts = [
    ["patch", raw.patch || "-"],
    ["checkpoint", raw.location || "-"],
    ["mapping", [code(raw.mapping), " sha256 ", code(raw.digest)]],
    ["direction", raw.saves ? "saving: parameters are read, the checkpoint is written" : "loading: the checkpoint is read, parameters are written"],
    ["parameters", `${counted(plan.targets)}; ${bytesText(raw.targetBytes)}`],
    ["checkpoint's tensors", `${counted(plan.sources)}; ${bytesText(raw.sourceBytes)} used`],
  ];
  const children = [make("h2", {}, "The plan"), table(["", ""], facts)];
  children.push(make("h3", {}, "Rules"), table(["parameter", "made of", "state", "count", "at"], raw.rules.map(rule)));
  const apart = groups.source.filter(({ members }) => members[0].state !== "used");
  if (apart.length) {
    const rows = apart.map(({ members, title }) => [
      linkTo(members[0], title), commas(members.length),
      members[0].state === "ignored" ? `ignored: ${reasonsOf(members)}` : `a copy of ${reasonsOf(members)}, which it must be equal to`,
    ]);
    children.push(make("h3", {}, "Tensors that are not used"), table(["tensor", "count", "why"], rows));
  }
  children.push(make("h3", {}, "Not bit for bit"));
  if (raw.inexact.length) {
    const rows = raw.inexact.flatMap(([reason, list]) => groupsOf(list.map((i) => plan.sources[i])).map(
      ({ members, title }) => [linkTo(members[0], title), commas(members.length), reason]));
    children.push(table(["tensor", "count", "why it does not come back bit for bit"], rows));
  } else {
    children.push(make("p", {}, "None: everything that is used comes back bit for bit."));
  }
  if (raw.notes.length) {
    children.push(make("h3", {}, "Notes"), make("ul", {}, ...raw.notes.map((note) => make("li", {}, note))));
  }
  main.replaceChildren(...children);
}

const reasonsOf = (members) => [...new Set(members.map((entry) => entry.note))].join("; ");

/** Choices of layer and expert, for names that differ in numbers only. */
function pickers(entry) {
  const { members, columns } = groupOf.get(entry);
  if (members.length < 2) return [];
  const numbers = numbersOf(entry.name);
  const words = entry.name.split(".");
  const go = (wanted, column) => {
    const distance = (other) => numbersOf(other.name).reduce(
      (sum, value, i) => sum + Math.abs(value - wanted[i]) * (i === column ? 1e6 : 1), 0);
    const best = members.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    location.hash = hashOf(best);
  };
  let seen = 0;
  return columns.flatMap((values, column) => {
    const choices = [...new Set(values)].sort((a, b) => a - b);
    while (!/^\d+$/.test(words[seen])) seen++;
    const word = seen > 0 ? words[seen - 1] : "number";
    seen++;
    if (choices.length < 2) return [];
    const to = (value) => go(numbers.map((old, i) => (i === column ? value : old)), column);
    const select = make("select", { "aria-label": word },
      ...choices.map((value) => make("option", { value: String(value), selected: value === numbers[column] }, String(value))));
    select.addEventListener("change", () => to(Number(select.value)));
    const at = choices.indexOf(numbers[column]);
    const step = (text, label, index) => {
      const button = make("button", { type: "button", disabled: index < 0 || index >= choices.length, "aria-label": `${label} of ${word}` }, text);
      button.addEventListener("click", () => to(choices[index]));
      return button;
    };
    return [make("label", {}, word, select), step("\u2039", "previous", at - 1), step("\u203a", "next", at + 1), make("span", { className: "gap" })];
  });
}

function detail(entry) {
  const look = new Look(plan, entry);
  const settings = { slab: 0, shade: state.shade, theme: theme() };
  const colours = new Map();
  const main = byId("main");
  const isTarget = entry.side === "target";
  const children = [make("h2", {}, named(entry.name))];
  const facts = [`${isTarget ? "parameter" : "tensor of the checkpoint"}, `, code(`${shapeText(entry.shape)} ${entry.dtype}`), `, ${entry.state}`];
  if (isTarget && raw.rules[entry.rule]) facts.push(" by the rule at ", code(raw.rules[entry.rule][0]));
  if (!isTarget && entry.state === "ignored" && entry.note) facts.push(`: ${entry.note}`);
  if (plan.inexact.has(entry.name) && !isTarget) facts.push(`; not bit for bit: ${plan.inexact.get(entry.name)}`);
  children.push(make("p", { className: "facts" }, ...facts));
  const bar = make("div", { className: "bar" }, ...pickers(entry));
  children.push(bar);

  const twin = isTarget && entry.tied !== null ? plan.targets[entry.tied]
    : !isTarget && entry.state === "redundant" ? plan.targetNames.get(entry.note) : null;
  if (twin) {
    const said = isTarget ? "It is the same parameter as " : "It is a second copy, and must be equal to ";
    children.push(make("p", {}, said, linkTo(twin), "."));
  }
  if (!look.parts.length) {
    if (!twin) children.push(make("p", {}, isTarget ? "Nothing is copied to it." : "It is not read."));
    main.replaceChildren(...children);
    state.detail = { entry, look, settings, colours };
    return;
  }

  const output = make("output", { id: "pointed", "aria-live": "polite" });
  const onPoint = (point) => { output.textContent = point === null ? hint : pointText(look, look.flat(settings.slab, point.row, point.col)); };
  const hint = "Point at an element, or move over it with the arrow keys, to see where it "
    + (isTarget ? "comes from." : "goes to.");
  output.textContent = hint;
  const drawing = new Drawing(look, colours, settings, onPoint);
  drawing.canvas.id = "drawing";
  const period = new Drawing(look, colours, settings, onPoint);
  period.canvas.id = "enlarged";
  const notice = make("p", { className: "notice", hidden: true });
  const caption = make("figcaption", {});
  const figure = make("figure", {}, drawing.canvas);
  const enlarged = make("figure", { hidden: true }, caption, period.canvas);
  const legend = make("div", { id: "legend" });

  const button = (text, label, action) => {
    const made = make("button", { type: "button", "aria-label": label }, text);
    made.addEventListener("click", action);
    return made;
  };
  const shade = make("input", { type: "checkbox", id: "shade", checked: state.shade });
  shade.addEventListener("change", () => {
    state.shade = settings.shade = shade.checked;
    refresh();
  });
  bar.append(button("+", "zoom in", () => drawing.zoom(0.5, drawing.point)), button("\u2212", "zoom out", () => drawing.zoom(2, drawing.point)),
    button("whole", "show the whole tensor", () => drawing.whole()),
    make("label", { title: `pale at the first element of the other tensor, full at its last` }, shade, "shade by position"));
  if (look.slabs > 1) children.push(slabSlider(look, settings, () => refresh()));
  children.push(figure, notice, enlarged, output, legend);
  main.replaceChildren(...children);

  const refresh = () => {
    colours.clear();
    const parts = look.partsIn(settings.slab);
    const others = [...new Set(parts.map((part) => part.other).filter((other) => other !== null))];
    others.forEach((other, i) => colours.set(other, rgbOf(PALETTE[i % PALETTE.length])));
    drawing.canvas.setAttribute("aria-label", `${entry.name} ${shapeText(entry.shape)}: ${plural(others.length, "tensor")}, listed below`);
    period.canvas.setAttribute("aria-label", "the first period, enlarged");
    legend.replaceChildren(legendOf(look, parts, colours, settings));
    drawing.draw();
    follow();
    onPoint(drawing.point);
  };
  const follow = () => {
    const { rows, cols, stripes } = drawing.thin();
    const isThin = look.numel > 0 && (rows || cols);
    // The eye does not see rows that change places within a few of thousands.
    const isMoved = look.partsIn(settings.slab).some((part) => /another order/.test(part.order)) && look.numel > 0;
    notice.hidden = !isThin;
    enlarged.hidden = !(isThin || isMoved) || drawing.isZoomed();
    if (isThin) tellThin(rows, cols, stripes);
    if (!enlarged.hidden) enlarge(rows || (isMoved && !cols), cols, stripes);
  };
  const tellThin = (rows, cols, stripes) => {
    const what = [rows ? `${plural(stripes.row, "row")} high` : "", cols ? `${plural(stripes.col, "column")} wide` : ""];
    notice.textContent = `Some stripes are only ${what.filter(Boolean).join(" and ")}, which is less than a pixel here: `
      + "the drawing mixes their colours. " + (enlarged.hidden ? "Zoom in to see them." : "The first period is drawn enlarged below; or zoom in.");
  };
  const enlarge = (rows, cols, stripes) => {
    const high = rows ? Math.min(look.rows, Math.max(2, Math.min(stripes.rowPeriod, 256))) : look.rows;
    const wide = cols ? Math.min(look.cols, Math.max(2, Math.min(stripes.colPeriod, 256))) : look.cols;
    period.box = { r0: 0, r1: high, c0: 0, c1: wide };
    period.fixedHeight = rows ? Math.min(380, Math.max(90, high * 22)) : 160;
    period.shadeWhatIsSeen();
    const isCut = (rows && high < stripes.rowPeriod) || (cols && wide < stripes.colPeriod);
    caption.textContent = `Enlarged: ${rows ? `rows 0..${commas(high)}` : "all rows"} and `
      + `${cols ? `columns 0..${commas(wide)}` : "all columns"}${isCut ? ", a part of the first period" : ", the first period"}`
      + (settings.shade ? "; shaded by position in what is seen here" : "");
    period.draw();
  };
  drawing.onMove = follow;
  refresh();
  state.detail = { entry, look, settings, colours, drawing, period, resized: () => { drawing.fixedHeight = 0; refresh(); } };
}

function slabSlider(look, settings, changed) {
  const names = () => unravel(settings.slab, look.lead).join(", ");
  const text = make("span", { className: "mono" }, `[${names()}, :, :] of ${shapeText(look.entry.shape)}`);
  const slider = make("input", { type: "range", id: "slab", min: "0", max: String(look.slabs - 1), value: "0", "aria-label": "slab" });
  slider.addEventListener("input", () => {
    settings.slab = Number(slider.value);
    text.textContent = `[${names()}, :, :] of ${shapeText(look.entry.shape)}`;
    changed();
  });
  return make("div", { className: "bar" }, make("label", {}, "Slab", slider), text);
}

function pointText(look, flat) {
  const here = shapeText(unravel(flat, look.entry.shape));
  const found = look.locate(flat);
  if (found === null) return `${here}: nothing`;
  if (found.part.other === null) return `${here} = ${found.part.constant} (a constant)`;
  const there = `${found.part.other.name} ${shapeText(unravel(found.flat, found.part.other.shape))}`;
  const affine = found.part.affine ? affineText(found.part.affine) : "";
  return look.isTarget ? `${here} <- ${there}${affine}` : `${here} -> ${there}${affine ? `, as${affine}` : ""}`;
}

function legendOf(look, parts, colours, settings) {
  const heads = look.isTarget ? ["", "from", "shape, dtype", "its part", "goes to", "order", "value"]
    : ["", "to", "shape, dtype", "its part", "from here", "order", "value"];
  const rows = parts.slice(0, MAX_LEGEND).map((part) => {
    const swatch = make("span", { className: "swatch" });
    if (part.other === null) {
      const { constant, hatch } = settings.theme;
      swatch.style.background = `repeating-linear-gradient(45deg, rgb(${constant}) 0 3px, rgb(${hatch}) 3px 5px)`;
      return [swatch, "a constant", "", "", part.here, "", part.constant];
    }
    swatch.style.background = `rgb(${colours.get(part.other)})`;
    const cast = part.other.dtype === look.entry.dtype ? part.other.dtype
      : look.isTarget ? `${part.other.dtype} -> ${look.entry.dtype}` : `${look.entry.dtype} -> ${part.other.dtype}`;
    return [swatch, linkTo(part.other), code(`${shapeText(part.other.shape)} ${cast}`), part.there, part.here,
      part.order || "kept", part.affine ? `source${affineText(part.affine)}` : ""];
  });
  const out = make("div", {}, table(heads, rows));
  if (parts.length > MAX_LEGEND) out.append(make("p", {}, `... and ${commas(parts.length - MAX_LEGEND)} more`));
  if (look.slabs > 1 && parts.length < look.parts.length) {
    out.append(make("p", { className: "facts" }, `Parts of this slab; the whole has ${commas(look.parts.length)}.`));
  }
  return out;
}

function entryOfHash() {
  let name;
  try {
    name = decodeURIComponent(location.hash.slice(1));
  } catch {
    name = location.hash.slice(1);
  }
  if (!name) return { entry: null, name };
  const isSource = name.startsWith("source:");
  const entry = isSource ? plan.sourceNames.get(name.slice(7))
    : plan.targetNames.get(name) || plan.targetNames.get(name.replace(/^target:/, "")) || plan.sourceNames.get(name);
  return { entry: entry || null, name };
}

function route() {
  const { entry, name } = entryOfHash();
  state.entry = entry;
  state.detail = null;
  if (entry !== null) {
    state.side = entry.side;
    document.title = `${entry.name} - tepatch plan`;
    detail(entry);
  } else {
    document.title = "tepatch plan";
    overview();
    if (name) byId("main").prepend(make("p", { className: "notice" }, `There is no '${name}' in this plan.`));
  }
  showList();
  const current = byId("list").querySelector("[aria-current]");
  if (current) current.scrollIntoView({ block: "nearest" });
}

function start() {
  byId("headline").textContent = `${raw.patch || raw.mapping} ${raw.saves ? "->" : "<-"} ${raw.location || "a checkpoint"}`;
  for (const side of ["target", "source"]) {
    byId(`tab-${side}s`).addEventListener("click", () => { state.side = side; showList(); });
  }
  byId("search").addEventListener("input", showList);
  byId("skip").addEventListener("click", (event) => { event.preventDefault(); byId("main").focus(); });
  window.addEventListener("hashchange", route);
  let timer = 0;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { if (state.detail !== null && state.detail.resized) state.detail.resized(); }, 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", route);
  route();
}

/** For the console, and for tests: what the drawing itself asks. */
window.tepatchPage = {
  state,
  locate(side, name, flat) {
    const found = new Look(plan, (side === "target" ? plan.targetNames : plan.sourceNames).get(name)).locate(flat);
    if (found === null) return null;
    return found.part.other === null ? { constant: found.part.constant } : { name: found.part.other.name, flat: found.flat };
  },
};

start();
