// The attention gallery: maps over images, masks that follow the threshold, and their IoU with the given masks.

// One map of an image with what its masks are made from: the patches in ascending order and their running sum.
class AttentionMap {
  constructor(values) {
    this.values = values;
    this.order = Uint32Array.from(values.keys()).sort((a, b) => values[a] - values[b] || a - b);
    this.running = new Float64Array(values.length);
    let sum = 0;
    this.order.forEach((patch, rank) => { sum += values[patch]; this.running[rank] = sum; });
    this.maximum = values[this.order.at(-1)] * values.length / sum; // times uniform attention
    this.scale = values.length / sum;
  }

  // The fewest patches that together hold this share: kept from where the running sum exceeds 1 - mass.
  mask(mass) {
    const inside = new Uint8Array(this.values.length);
    const total = this.running.at(-1);
    for (let rank = this.order.length - 1; rank >= 0 && this.running[rank] / total > 1 - mass; rank--) {
      inside[this.order[rank]] = 1;
    }
    return inside;
  }
}

// How many of a side's pixels belong to each patch: those whose center lies in it.
function pixelsPerPatch(pixels, patches) {
  const counts = new Array(patches).fill(0);
  for (let pixel = 0; pixel < pixels; pixel++) counts[Math.floor(((pixel + 0.5) * patches) / pixels)]++;
  return counts;
}

// An image of the gallery; its last map is the mean of the heads.
class GalleryEntry {
  constructor(entry) {
    Object.assign(this, entry);
    const levels = new Uint16Array(bytes(entry.maps).buffer);
    const size = this.rows * this.columns;
    const heads = entry.maxima.map((maximum, head) =>
      Float64Array.from(levels.subarray(head * size, (head + 1) * size), (level) => (level / 65535) ** 2 * maximum));
    const mean = new Float64Array(size).map((_, patch) => heads.reduce((sum, head) => sum + head[patch], 0) / heads.length);
    this.maps = [...heads, mean].map((values) => new AttentionMap(values));
    if (!this.groundTruth) return;
    this.foreground = new Uint32Array(bytes(this.groundTruth.foreground).buffer);
    const [down, across] = [pixelsPerPatch(this.groundTruth.height, this.rows), pixelsPerPatch(this.groundTruth.width, this.columns)];
    const valid = this.groundTruth.valid && new Uint32Array(bytes(this.groundTruth.valid).buffer);
    this.pixels = valid ?? down.flatMap((height) => across.map((width) => height * width));
    this.foregroundPixels = this.foreground.reduce((sum, count) => sum + count, 0);
  }

  iou(mask) {
    let [intersection, area] = [0, 0];
    mask.forEach((inside, patch) => { if (inside) { intersection += this.foreground[patch]; area += this.pixels[patch]; } });
    return intersection / (area + this.foregroundPixels - intersection);
  }
}

// The border of a mask of patches as closed loops in a square of side 1000.
function outlinePath(mask, rows, columns) {
  const at = (row, column) => row >= 0 && row < rows && column >= 0 && column < columns && mask[row * columns + column];
  const corner = (row, column) => row * (columns + 1) + column;
  const following = new Map();
  const add = (from, to) => following.has(from) ? following.get(from).push(to) : following.set(from, [to]);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      if (!at(row, column)) continue;
      if (!at(row - 1, column)) add(corner(row, column), corner(row, column + 1));
      if (!at(row, column + 1)) add(corner(row, column + 1), corner(row + 1, column + 1));
      if (!at(row + 1, column)) add(corner(row + 1, column + 1), corner(row + 1, column));
      if (!at(row, column - 1)) add(corner(row + 1, column), corner(row, column));
    }
  }
  let path = "";
  for (const start of following.keys()) {
    for (let here = start, letter = "M"; following.get(here)?.length; letter = "L") {
      path += `${letter}${Math.round((1000 * (here % (columns + 1))) / columns)} ${Math.round((1000 * Math.floor(here / (columns + 1))) / rows)}`;
      here = following.get(here).pop();
      if (!following.get(here)?.length) path += "Z";
    }
  }
  return path;
}

// An image under a map's colors and the outlines of its mask and of the given one.
class Overlay {
  constructor(stack, image) {
    stack.classList.add("heat");
    if (image) stack.append(image);
    this.canvas = document.createElement("canvas");
    stack.append(this.canvas);
    stack.insertAdjacentHTML("beforeend", `<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">
      <g class="given"><path class="halo"/><path class="ground-truth"/></g><g><path class="halo"/><path class="mask"/></g></svg>`);
    this.paths = { given: stack.querySelectorAll(".given path"), mask: stack.querySelectorAll("g:last-child path") };
  }

  drawHeat(entry, map, scaleMax) {
    const pixels = new ImageData(entry.columns, entry.rows);
    map.values.forEach((value, patch) => {
      const heat = Math.sqrt(Math.min(1, (value * map.scale) / scaleMax));
      const color = 3 * Math.round(255 * heat);
      pixels.data.set([ramp[color], ramp[color + 1], ramp[color + 2], 255 * (0.25 + 0.75 * heat)], 4 * patch);
    });
    Object.assign(this.canvas, { width: entry.columns, height: entry.rows });
    this.canvas.getContext("2d").putImageData(pixels, 0, 0);
    this.paths.given.forEach((path) => path.setAttribute("d", entry.groundTruth?.outline ?? ""));
  }

  drawMask(entry, mask) {
    const outline = outlinePath(mask, entry.rows, entry.columns);
    this.paths.mask.forEach((path) => path.setAttribute("d", outline));
  }
}

const ramp = bytes(data.colors);
const entries = data.gallery.map((entry) => new GalleryEntry(entry));
if (entries.length) startGallery();

function startGallery() {
  const names = ["mean", ...data.heads];
  const tileHeads = [data.heads.length, ...data.heads.keys()]; // of the tiles: the mean stands last among the maps
  const cards = [...document.querySelectorAll(".images .tile")];
  const images = cards.map((card) => card.querySelector("img"));
  const overlays = cards.map((card) => new Overlay(card.querySelector(".stack")));
  const largeImage = new Image();
  const large = new Overlay(byId("large"), largeImage);
  const all = entries.flatMap((entry) => entry.maps.flatMap((map) => Array.from(map.values, (v) => v * map.scale)));
  const sharedMax = Math.max(data.minScaleMax, Float64Array.from(all).sort()[Math.ceil(0.995 * all.length) - 1]);
  const state = { head: data.heads.length, image: 0, mass: data.attentionMass };

  const tiles = tileHeads.map((head, number) => {
    const tile = document.createElement("label");
    tile.className = "tile";
    tile.innerHTML = `<input type="radio" name="head" value="${head}"><span class="stack"></span><span class="name"></span> <span class="iou"></span>`;
    tile.querySelector(".name").textContent = names[number];
    tile.querySelector("input").checked = head === state.head;
    byId("head-tiles").append(tile);
    const image = new Image();
    image.alt = "";
    return { tile, head, image, overlay: new Overlay(tile.querySelector(".stack"), image) };
  });

  const scaleMaxOf = (map) => (chosen("scale") === "shared" ? sharedMax : map.maximum);
  const percent = (share) => `${+(100 * share).toFixed(1)} %`;

  function showMasks() {
    const entry = entries[state.image];
    for (const { tile, head, overlay } of tiles) {
      const mask = entry.maps[head].mask(state.mass);
      overlay.drawMask(entry, mask);
      tile.querySelector(".iou").textContent = entry.groundTruth ? `IoU ${entry.iou(mask).toFixed(2)}` : "";
    }
    const ious = entries.map((each, index) => {
      const mask = each.maps[state.head].mask(state.mass);
      overlays[index].drawMask(each, mask);
      const iou = each.groundTruth ? each.iou(mask) : null;
      cards[index].querySelector(".iou").textContent = iou === null ? "" : `IoU ${iou.toFixed(2)}`;
      return iou;
    });
    const scored = ious.filter((iou) => iou !== null);
    const mean = scored.reduce((sum, iou) => sum + iou, 0) / scored.length;
    const name = names[tileHeads.indexOf(state.head)];
    byId("attention-mean").textContent =
      scored.length ? `mean IoU of the ${scored.length} with a given mask, ${name}: ${mean.toFixed(2)}` : "";
    const mask = entry.maps[state.head].mask(state.mass);
    large.drawMask(entry, mask);
    const covered = mask.reduce((sum, inside) => sum + inside, 0) / mask.length;
    const iou = ious[state.image];
    byId("mass-now").textContent = percent(state.mass);
    byId("attention-now").textContent =
      `${entry.name}, ${name}: ${percent(state.mass)} of the attention lies on ${percent(covered)} of the image` +
      `${iou === null ? "" : `, IoU ${iou.toFixed(2)}`}. The strongest patch has ` +
      `${entry.maps[state.head].maximum.toFixed(1)} times uniform attention.`;
  }

  function showMaps() {
    const entry = entries[state.image];
    const source = images[state.image];
    for (const { head, image, overlay } of [...tiles, { head: state.head, image: largeImage, overlay: large }]) {
      Object.assign(image, { src: source.src, width: source.width, height: source.height });
      overlay.drawHeat(entry, entry.maps[head], scaleMaxOf(entry.maps[head]));
    }
    largeImage.alt = `${entry.name} under the attention of ${names[tileHeads.indexOf(state.head)]}`;
    entries.forEach((each, index) => overlays[index].drawHeat(each, each.maps[state.head], scaleMaxOf(each.maps[state.head])));
    const marks = chosen("scale") === "shared"
      ? ["0", (sharedMax / 4).toFixed(1), `${sharedMax.toFixed(1)} × uniform attention`]
      : ["0", "a quarter", "the map’s strongest patch"];
    byId("ramp-text").replaceChildren(...marks.map((mark) => Object.assign(document.createElement("span"), { textContent: mark })));
    showMasks();
  }

  function showStrength() {
    const strength = byId("strength").value / 100;
    byId("gallery").style.setProperty("--strength", strength);
    byId("gallery").style.setProperty("--gray", Math.min(1, 1.25 * strength));
    byId("strength-now").textContent = percent(strength);
  }

  const whole = byId("ramp").getContext("2d").createImageData(256, 1);
  for (let level = 0; level < 256; level++) whole.data.set([...ramp.subarray(3 * level, 3 * level + 3), 255], 4 * level);
  byId("ramp").getContext("2d").putImageData(whole, 0, 0);

  byId("mass").addEventListener("input", (event) => { state.mass = event.target.value / 100; showMasks(); });
  byId("strength").addEventListener("input", showStrength);
  byId("show-ground-truth")?.addEventListener("change", (event) => byId("gallery").classList.toggle("no-ground-truth", !event.target.checked));
  byId("gallery").addEventListener("change", ({ target }) => {
    if (target.name === "head") state.head = Number(target.value);
    if (target.name === "image") state.image = Number(target.value);
    if (["head", "image", "scale"].includes(target.name)) showMaps();
  });
  showStrength();
  showMaps();
  if (byId("hero")) showHero(images);
}

// At the head of the page: some images, each over the attention of its heads' mean.
function showHero(images) {
  const shown = entries.slice(0, 10);
  shown.forEach((entry, index) => {
    const pair = document.createElement("div");
    pair.style.setProperty("--aspect", images[index].width / images[index].height);
    const [plain, heat] = [0, 1].map(() => {
      const stack = Object.assign(document.createElement("span"), { className: "stack" });
      pair.append(stack);
      return stack;
    });
    const copy = () => Object.assign(new Image(), { src: images[index].src, alt: "" });
    plain.append(copy());
    new Overlay(heat, copy()).drawHeat(entry, entry.maps.at(-1), entry.maps.at(-1).maximum);
    if (index % 5 === 0) byId("hero").querySelector(".pairs").append(document.createElement("div"));
    byId("hero").querySelector(".pairs").lastElementChild.append(pair);
  });
  const which = entries.some((entry) => entry.groundTruth)
    ? `the ${shown.length} of ${entries.length} images with the highest IoU` : `${shown.length} of ${entries.length} images`;
  byId("hero").querySelector("figcaption").innerHTML =
    `Below each image the attention of the [CLS] token, mean of the heads, each on its own scale: ${which}. <a href="#gallery">All, head by head</a>`;
  byId("hero").hidden = false;
}
