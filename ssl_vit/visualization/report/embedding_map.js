// The feature map: points by class, a thumbnail for the one that is pointed at or walked to.
if (data.embeddingMap) startMap(data.embeddingMap);

function startMap(features) {
  const canvas = byId("map");
  const [tip, thumb] = [byId("tip"), byId("thumb")];
  const known = features.labels.some((label) => label < 0) ? [...features.classes, "no class"] : features.classes;
  const classOf = features.labels.map((label) => (label < 0 ? features.classes.length : label));
  const shown = known.map(() => true);
  const margin = 16;
  const reach = 14; // pixels from the pointer to a point
  let [width, height, current] = [0, 0, -1];
  let colors = [];

  // Class as color and as shape: ten colors, five shapes.
  const shapes = [
    (draw, x, y, r) => draw.arc(x, y, r, 0, 2 * Math.PI),
    (draw, x, y, r) => draw.rect(x - 0.85 * r, y - 0.85 * r, 1.7 * r, 1.7 * r),
    (draw, x, y, r) => polygon(draw, [[x, y - 1.2 * r], [x + 1.1 * r, y + 0.8 * r], [x - 1.1 * r, y + 0.8 * r]]),
    (draw, x, y, r) => polygon(draw, [[x, y - 1.3 * r], [x + 1.3 * r, y], [x, y + 1.3 * r], [x - 1.3 * r, y]]),
    (draw, x, y, r) => polygon(draw, [[x, y + 1.2 * r], [x + 1.1 * r, y - 0.8 * r], [x - 1.1 * r, y - 0.8 * r]]),
  ];
  function polygon(draw, corners) {
    corners.forEach(([x, y], corner) => (corner ? draw.lineTo(x, y) : draw.moveTo(x, y)));
    draw.closePath();
  }
  function mark(draw, number, x, y, r) {
    draw.fillStyle = colors[number % 10];
    draw.beginPath();
    shapes[(number + Math.floor(number / 10)) % 5](draw, x, y, r);
    draw.fill();
  }

  // The square of the points fills the canvas as far as the points reach; both axes keep one scale.
  const extent = [features.x, features.y].map((values) => Math.max(...values) - Math.min(...values) || 1);
  function position(point) {
    const scale = Math.min((width - 2 * margin) / extent[0], (height - 2 * margin) / extent[1]);
    return [width / 2 + (features.x[point] - 0.5) * scale, height / 2 + (features.y[point] - 0.5) * scale];
  }

  function paint() {
    const style = document.createElement("span");
    document.body.append(style);
    colors = Array.from({ length: 10 }, (_, number) => {
      style.style.color = `var(--class-${number})`;
      return getComputedStyle(style).color;
    });
    style.style.color = "var(--ink)";
    const ink = getComputedStyle(style).color;
    style.remove();
    [width, height] = [canvas.clientWidth, canvas.clientHeight];
    Object.assign(canvas, { width: width * devicePixelRatio, height: height * devicePixelRatio });
    const draw = canvas.getContext("2d");
    draw.scale(devicePixelRatio, devicePixelRatio);
    const radius = features.x.length > 3000 ? 2.4 : 3.6;
    for (const visible of [false, true]) {
      draw.globalAlpha = visible ? 0.85 : 0.1;
      classOf.forEach((number, point) => { if (shown[number] === visible) mark(draw, number, ...position(point), radius); });
    }
    if (current >= 0) {
      draw.globalAlpha = 1;
      mark(draw, classOf[current], ...position(current), radius + 2);
      draw.strokeStyle = ink;
      draw.lineWidth = 2;
      draw.beginPath();
      draw.arc(...position(current), radius + 7, 0, 2 * Math.PI);
      draw.stroke();
    }
    for (const [number, swatch] of document.querySelectorAll("#class-list canvas").entries()) {
      Object.assign(swatch, { width: 28, height: 28 });
      mark(swatch.getContext("2d"), number, 14, 14, 9);
    }
  }

  function select(point) {
    if (point === current) return;
    current = point;
    tip.hidden = point < 0;
    byId("map-now").textContent = point < 0 ? "" : `${features.names[point]}, ${known[classOf[point]]}`;
    if (point >= 0) showTip(point);
    paint();
  }

  function showTip(point) {
    const { uri, cell, columns, sizes } = features.sprite;
    const [w, h] = sizes[point];
    const factor = 144 / Math.max(w, h);
    Object.assign(thumb.style, {
      backgroundImage: `url(${uri})`,
      backgroundSize: `${columns * cell * factor}px auto`,
      backgroundPosition: `${-(point % columns) * cell * factor}px ${-Math.floor(point / columns) * cell * factor}px`,
      width: `${w * factor}px`,
      height: `${h * factor}px`,
    });
    byId("tip-text").textContent = `${known[classOf[point]]}: ${features.names[point]}`;
    const [x, y] = position(point);
    tip.style.left = `${Math.max(0, Math.min(width - 162, x > width / 2 ? x - 162 - 18 : x + 18))}px`;
    tip.style.top = `${Math.max(0, Math.min(height - tip.offsetHeight, y - tip.offsetHeight / 2))}px`;
  }

  // The point that scores lowest among the visible ones; -1 where none scores.
  function best(score) {
    let [found, lowest] = [-1, Infinity];
    for (const point of features.x.keys()) {
      const value = shown[classOf[point]] && point !== current ? score(...position(point)) : Infinity;
      if (value < lowest) [found, lowest] = [point, value];
    }
    return found;
  }
  const near = (x, y, limit) => best((px, py) => (Math.hypot(px - x, py - y) <= limit ? Math.hypot(px - x, py - y) : Infinity));

  // The nearest one within a quarter turn around the direction.
  function walk(dx, dy) {
    const [x, y] = position(current);
    const next = best((px, py) => {
      const [along, aside] = [(px - x) * dx + (py - y) * dy, Math.abs((px - x) * dy) + Math.abs((py - y) * dx)];
      return along > 0 && along >= aside ? along + 2 * aside : Infinity;
    });
    if (next >= 0) select(next);
  }

  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Escape") select(-1);
    if (!(event.key in steps)) return;
    event.preventDefault();
    if (current < 0) select(near(width / 2, height / 2, Infinity));
    else walk(...steps[event.key]);
  });
  canvas.addEventListener("focus", () => { if (current < 0 && canvas.matches(":focus-visible")) select(near(width / 2, height / 2, Infinity)); });
  canvas.addEventListener("blur", () => select(-1));
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = [event.offsetX, event.offsetY];
    const [cx, cy] = current < 0 ? [Infinity, Infinity] : position(current);
    const other = near(x, y, reach);
    const stays = Math.hypot(cx - x, cy - y) <= reach;
    if (other >= 0 && !(stays && Math.hypot(cx - x, cy - y) <= Math.hypot(position(other)[0] - x, position(other)[1] - y))) select(other);
    else if (!stays) select(-1);
  });
  canvas.addEventListener("pointerleave", () => { if (document.activeElement !== canvas) select(-1); });

  known.forEach((name, number) => {
    const label = document.createElement("label");
    label.innerHTML = `<input type="checkbox" checked><canvas aria-hidden="true"></canvas><span></span>`;
    label.querySelector("span").textContent = name;
    label.querySelector("input").addEventListener("change", (event) => {
      shown[number] = event.target.checked;
      select(-1);
      paint();
    });
    byId("class-list").append(label);
  });
  for (const [id, value] of [["classes-all", true], ["classes-none", false]]) {
    byId(id).addEventListener("click", () => {
      document.querySelectorAll("#class-list input").forEach((box, number) => { box.checked = shown[number] = value; });
      select(-1);
      paint();
    });
  }
  new ResizeObserver(paint).observe(canvas);
  redrawOnScheme.push(paint);
}
