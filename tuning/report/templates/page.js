for (const box of document.querySelectorAll(".wide")) {
  const look = () => {
    const left = box.scrollWidth - box.clientWidth - box.scrollLeft;
    box.classList.toggle("more", left > 2);
    box.previousElementSibling.hidden = box.scrollWidth - box.clientWidth <= 2;
  };
  box.addEventListener("scroll", look);
  new ResizeObserver(look).observe(box);
  look();
}
for (const table of document.querySelectorAll("table.sort")) {
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (!head) return;
    const up = head.getAttribute("aria-sort") === "descending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[head.cellIndex].textContent.trim();
    const rows = [...table.tBodies[0].rows];
    const order = (a, b) => {
      const s = key(a), t = key(b);
      if (!s || !t) return (s ? 0 : 1) - (t ? 0 : 1);
      const x = parseFloat(s), y = parseFloat(t);
      const found = isNaN(x) || isNaN(y) ? s.localeCompare(t) : x - y;
      return up ? found : -found;
    };
    table.tBodies[0].append(...rows.sort(order));
  });
}
// A mark of a plot tells its trial while a pointer is on it; a click keeps what it says, with a link to its folder.
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
tip.hidden = true;
let kept = false;
const hide = () => {
  kept = false;
  tip.hidden = true;
  for (const mark of document.querySelectorAll(".plot .on")) mark.classList.remove("on");
};
const tell = (event) => {
  const mark = event.target.closest(".plot [data-t]");
  if (!mark) return false;
  hide();
  const number = mark.dataset.t, [text, folder] = trials[number];
  tip.textContent = text;
  if (folder) {
    const link = tip.appendChild(document.createElement("a"));
    link.href = folder;
    link.textContent = folder;
  }
  for (const same of document.querySelectorAll(`.plot [data-t="${number}"]`)) same.classList.add("on");
  tip.hidden = false;
  const edge = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${scrollX + Math.max(4, Math.min(event.clientX + 14, edge))}px`;
  const below = event.clientY + 18 + tip.offsetHeight < innerHeight || event.clientY < tip.offsetHeight + 14;
  tip.style.top = `${scrollY + event.clientY + (below ? 18 : -tip.offsetHeight - 12)}px`;
  return true;
};
document.addEventListener("pointerover", (event) => {
  if (!kept && !tell(event) && !tip.contains(event.target)) hide();
});
document.addEventListener("click", (event) => {
  if (tip.contains(event.target)) return;
  if (tell(event)) kept = true;
  else hide();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
});
