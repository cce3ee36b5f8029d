"use strict";
const element = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const { nonce } = document.currentScript;
const PAGE_ROWS = 50, MAX_OPTIONS = 500;

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(element(id).textContent), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

// Runs a module inside the page, where its Content-Security-Policy lets nothing be loaded.
function runScript(code) {
  const script = document.createElement("script");
  script.type = "module";
  script.nonce = nonce;
  return new Promise((resolve, reject) => {
    globalThis.plottingLoaded = resolve;
    script.onerror = reject;
    script.textContent = code + "\nplottingLoaded();";
    document.head.append(script);
  });
}

// Control and direction characters as \u{...}: a completion cannot reorder or hide its neighbors.
const printable = (text) =>
  text.replace(/[^\P{C}\n]/gu, (char) => `\\u{${char.codePointAt(0).toString(16)}}`);
const shownNumber = (value) =>
  typeof value !== "number" ? "-" : Number.isInteger(value) ? String(value) : value.toPrecision(3);

// ------------------------------------------------------------------ figures

// A figure's specification with the page's colors, as wide as its place.
function fitted(spec, values, width) {
  const style = getComputedStyle(document.documentElement);
  const colors = { ink: "--text", muted: "--muted", rule: "--line" };
  const params = Object.entries(colors).map(([name, key]) => ({ name, value: style.getPropertyValue(key).trim() }));
  const legend = { ...spec.config.legend, columns: Math.max(1, Math.floor(width / 180)) };
  const size = { width: "container", height: 190, autosize: { type: "fit-x", contains: "padding" } };
  return { ...size, ...spec, title: null, data: { values }, background: "transparent",
    config: { ...spec.config, params, legend } };
}

async function draw(figure, spec, range) {
  const [caption, place] = figure.children;
  const inside = (row) => !range || spec.usermeta.x !== "step" || (row.x >= range[0] && row.x <= range[1]);
  const shown = fitted(spec, spec.data.values.filter(inside), place.clientWidth);
  caption.textContent = spec.title;
  const { view } = await vegaEmbed(place, shown, { actions: false, renderer: "canvas" });
  figure.view?.finalize();
  figure.view = view;
}

function zoomable(figures, specs) {
  let range = null;
  const all = () => Promise.all(figures.map((figure, i) => draw(figure, specs[i], range)));
  const zoom = (to) => {
    range = to;
    element("unzoom").hidden = !to;
    return all();
  };
  figures.forEach((figure, i) => {
    figure.addEventListener("dblclick", () => range && zoom(null));
    figure.addEventListener("pointerdown", () =>
      addEventListener("pointerup", () => setTimeout(() => {
        const dragged = Object.values(figure.view.signal("zoom") ?? {})[0];
        if (dragged && specs[i].usermeta.x === "step") zoom(dragged);
      }), { once: true }));
  });
  element("unzoom")?.addEventListener("click", () => zoom(null));
  dark.addEventListener("change", all);
  return all();
}

// ------------------------------------------------------------------ samples

class Table {
  constructor(samples, followed) {
    Object.assign(this, samples);
    this.at = Object.fromEntries(this.columns.map((name, i) => [name, i]));
    this.followed = followed;
    this.sorted = { column: this.at.step, down: true };
    this.limit = PAGE_ROWS;
    this.texts = this.rows.map((row) =>
      [this.prompts[row[this.at.prompt]], row[this.at.completion], row[this.at.note]].join("\n").toLowerCase());
    this.used = this.columns.map((_, i) => i).filter((i) => this.rows.some((row) => row[i] !== null && row[i] !== ""));
    this.form = element("filters");
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => this.changed());
    this.form.addEventListener("reset", () => setTimeout(() => this.changed()));
    element("more").addEventListener("click", () => { this.limit += 4 * PAGE_ROWS; this.show(); });
    dark.addEventListener("change", () => this.follow());
    this.offerPrompts();
    this.changed();
  }

  offerPrompts() {
    const steps = this.prompts.map(() => new Set());
    for (const row of this.rows) steps[row[this.at.prompt]].add(row[this.at.step]);
    this.steps = steps.map((found) => found.size);
    const often = [...this.prompts.keys()].sort((a, b) => this.steps[b] - this.steps[a]);
    often.slice(0, MAX_OPTIONS).forEach((prompt) => this.offer(prompt));
  }

  offer(prompt) {
    const name = printable(this.prompts[prompt]).replace(/\s+/g, " ").slice(0, 120);
    const label = `${name}  (${this.steps[prompt]} step${this.steps[prompt] === 1 ? "" : "s"})`;
    this.form.prompt.append(new Option(label, prompt));
  }

  changed() {
    this.limit = PAGE_ROWS;
    this.filter();
    this.show();
    this.follow();
  }

  filter() {
    const { text, step_from, step_to, reward_from, reward_to, prompt } = Object.fromEntries(new FormData(this.form));
    const words = text.toLowerCase();
    const inside = (value, low, high) =>
      (low === "" || (value !== null && value >= +low)) && (high === "" || (value !== null && value <= +high));
    const { step, reward, prompt: of } = this.at;
    this.found = this.rows.filter((row, i) =>
      (prompt === "" || row[of] === +prompt) && inside(row[step], step_from, step_to) &&
      inside(row[reward], reward_from, reward_to) && this.texts[i].includes(words));
    const { column, down } = this.sorted;
    const key = column === of ? (row) => this.prompts[row[of]] : (row) => row[column];
    const order = (a, b) => (a === b ? 0 : a === null ? 1 : b === null ? -1 : (a < b) === down ? 1 : -1);
    this.found.sort((a, b) => order(key(a), key(b)));
  }

  show() {
    const heads = this.used.map((i) => {
      const head = document.createElement("th");
      const arrow = this.sorted.column === i ? (this.sorted.down ? " \u25be" : " \u25b4") : "";
      head.textContent = printable(this.columns[i]) + arrow;
      head.addEventListener("click", () => {
        this.sorted = { column: i, down: this.sorted.column === i ? !this.sorted.down : true };
        this.changed();
      });
      return head;
    });
    element("heads").replaceChildren(this.line(heads));
    element("rows").replaceChildren(...this.found.slice(0, this.limit).map((row) => this.line(this.used.map((i) => this.cell(row, i)))));
    element("more").hidden = this.found.length <= this.limit;
    element("count").textContent = `${this.found.length.toLocaleString("en")} of ${this.total.toLocaleString("en")} samples.`;
  }

  line(cells) {
    const line = document.createElement("tr");
    line.append(...cells);
    return line;
  }

  cell(row, i) {
    const cell = document.createElement("td");
    const name = this.columns[i];
    cell.dataset.name = printable(name);
    if (i < this.at.note + 1 && ["prompt", "completion", "note"].includes(name)) {
      const text = document.createElement("div");
      text.textContent = printable(i === this.at.prompt ? this.prompts[row[i]] : row[i]);
      cell.className = "text";
      cell.append(text);
      if (i === this.at.prompt) {
        cell.classList.add("prompt");
        cell.title = "follow this prompt across steps";
        cell.addEventListener("click", () => this.choose(row[i]));
      }
    } else {
      cell.textContent = typeof row[i] === "string" ? printable(row[i]) : shownNumber(row[i]);
    }
    return cell;
  }

  choose(prompt) {
    if (![...this.form.prompt.options].some((option) => option.value === String(prompt))) this.offer(prompt);
    this.form.reset();
    setTimeout(() => {
      this.form.prompt.value = prompt;
      this.changed();
    });
  }

  follow() {
    const prompt = this.form.prompt.value, figure = element("followed");
    figure.hidden = prompt === "";
    if (prompt === "") return;
    const steps = new Map();
    for (const row of this.rows) {
      if (row[this.at.prompt] !== +prompt || row[this.at.reward] === null) continue;
      steps.set(row[this.at.step], [...(steps.get(row[this.at.step]) ?? []), row[this.at.reward]]);
    }
    const values = [...steps].sort((a, b) => a[0] - b[0]).map(([x, rewards]) => ({
      x, s0: rewards.reduce((a, b) => a + b) / rewards.length, s1: Math.max(...rewards), s2: Math.min(...rewards),
    }));
    draw(figure, { ...this.followed, data: { values } }, null);
  }
}

(async () => {
  try {
    const [data, plotting] = await Promise.all([unpacked("data"), unpacked("plotting")]);
    await runScript(plotting);
    if (element("samples")) new Table(data.samples, data.followed);
    await zoomable([...document.querySelectorAll("figure.figure")], data.figures);
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    element("broken").hidden = false;
    element("broken").textContent = `This browser could not draw the page: ${error}`;
  }
})();
