// What scrolls sideways can be reached by the keyboard.
addEventListener("load", () => {
  const reach = () => {
    for (const box of document.querySelectorAll("pre, div.math, .equation, .table-wrapper")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    }
  };
  reach();
  addEventListener("resize", reach);
});
