// Masks beside the given ones: one method at a time, sorted by its IoU.
if (byId("mask-tiles")) {
  const cards = [...byId("mask-tiles").children].map((card) => ({ card, ious: JSON.parse(card.dataset.ious) }));

  document.querySelectorAll("#mask-tiles .halo").forEach((halo) => halo.setAttribute("d", halo.nextElementSibling.getAttribute("d")));

  const show = () => {
    const method = Number(chosen("method"));
    const sign = chosen("order") === "worst" ? 1 : -1;
    cards.sort((a, b) => sign * (a.ious[method] - b.ious[method]));
    byId("mask-tiles").append(...cards.map(({ card }) => card));
    for (const { card, ious } of cards) {
      card.querySelectorAll("g").forEach((group, number) => group.classList.toggle("off", number !== method));
      card.querySelector(".iou").textContent = `IoU ${ious[method].toFixed(2)}`;
    }
    const mean = cards.reduce((sum, { ious }) => sum + ious[method], 0) / cards.length;
    byId("masks-now").textContent = `mean IoU ${mean.toFixed(2)} of the ${cards.length} images shown`;
  };

  byId("masks").addEventListener("change", show);
  show();
}
