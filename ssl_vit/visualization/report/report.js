// What all parts of the page share, and the page's own behavior: color scheme and the current section in the table of contents.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const bytes = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const redrawOnScheme = []; // functions that draw with colors of the scheme

function isDark() {
  const forced = document.documentElement.dataset.scheme;
  return forced ? forced === "dark" : prefersDark.matches;
}

function schemeChanged() {
  byId("scheme").textContent = isDark() ? "Light colors" : "Dark colors";
  redrawOnScheme.forEach((draw) => draw());
}

byId("scheme").addEventListener("click", () => {
  document.documentElement.dataset.scheme = isDark() ? "light" : "dark";
  schemeChanged();
});
prefersDark.addEventListener("change", schemeChanged);
schemeChanged();

// In the table of contents, the section that is being read: the last one that has begun.
const links = [...document.querySelectorAll("nav a")];
const sections = links.map((link) => document.querySelector(link.hash));
let current = null;
function markSection() {
  const atEnd = scrollY + innerHeight >= document.documentElement.scrollHeight - 2;
  const begun = sections.filter((section) => section.getBoundingClientRect().top < innerHeight / 3);
  const section = atEnd ? sections.at(-1) : begun.at(-1);
  if (section === current) return;
  current = section;
  links.forEach((link, number) => {
    if (sections[number] !== section) return link.removeAttribute("aria-current");
    link.setAttribute("aria-current", "true");
    const list = link.closest("ul");
    list.scrollLeft = link.offsetLeft - (list.clientWidth - link.offsetWidth) / 2;
  });
}
addEventListener("scroll", markSection, { passive: true });
markSection();
