
"use strict";
const rows = Array.from(document.querySelectorAll("#tensors tbody tr"));
const texts = rows.map((row) => row.textContent.toLowerCase());
const filter = document.getElementById("filter");
const count = document.getElementById("count");
function show() {
  const wanted = filter.value.trim().toLowerCase();
  let shown = 0;
  rows.forEach((row, index) => {
    row.hidden = !texts[index].includes(wanted);
    shown += row.hidden ? 0 : 1;
  });
  count.textContent = shown + " of " + rows.length;
}
filter.addEventListener("input", show);
document.getElementById("search").hidden = false;
show();
