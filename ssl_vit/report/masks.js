// Masks beside the given ones: one method at a time, sorted by its IoU.
if (byId("mask-tiles")) {
  const cards = [...byId("mask-tiles").children].map((card) => ({ card, ious: JSON.parse(card.dataset.ious) }));

  const show = () => {
    const method = chosen("method");
    const sign = chosen("order") === "worst" ? 1 : -1;
    const scored = cards.filter(({ ious }) => method in ious);
    cards.sort((a, b) => sign * ((a.ious[method] ?? sign * 2) - (b.ious[method] ?? sign * 2)));
    byId("mask-tiles").append(...cards.map(({ card }) => card));
    for (const { card, ious } of cards) {
      card.querySelectorAll("g").forEach((group) => group.classList.toggle("off", group.dataset.method !== method));
      card.querySelector(".iou").textContent = method in ious ? `IoU ${ious[method].toFixed(2)}` : "no mask";
    }
    const mean = scored.reduce((sum, { ious }) => sum + ious[method], 0) / scored.length;
    byId("masks-now").textContent = `${method}: mean IoU ${mean.toFixed(2)} of the ${scored.length} pictures shown`;
  };

  byId("masks").addEventListener("change", show);
  show();
}
