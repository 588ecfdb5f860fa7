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
