// Masks beside the given ones: one method at a time, sorted by its IoU.
if (byId("mask-tiles")) {
  const cards = [...byId("mask-tiles").children].map((card) => ({ card, ious: JSON.parse(card.dataset.ious) }));

  const show = () => {
    const method = Number(chosen("method"));
    const sign = chosen("order") === "worst" ? 1 : -1;
    const has = ({ ious }) => ious[method] !== null;
    const scored = cards.filter(has).sort((a, b) => sign * (a.ious[method] - b.ious[method]));
    const others = cards.filter((card) => !has(card));
    byId("mask-tiles").append(...[...scored, ...others].map(({ card }) => card));
    for (const { card, ious } of cards) {
      card.querySelectorAll("g").forEach((group, place) => group.classList.toggle("off", place !== method));
      card.querySelector(".iou").textContent = ious[method] === null ? "no mask" : `IoU ${ious[method].toFixed(2)}`;
    }
    const mean = scored.reduce((sum, { ious }) => sum + ious[method], 0) / scored.length;
    byId("masks-now").textContent = `mean IoU ${mean.toFixed(2)} of the ${scored.length} images shown`;
  };

  byId("masks").addEventListener("change", show);
  show();
}
