(function () {
  var choice = document.getElementById("metric-choice");
  if (!choice) return;
  var blocks = document.querySelectorAll("[data-metric]");
  function show() {
    blocks.forEach(function (block) {
      block.classList.toggle("unchosen", choice.value !== "all" && block.dataset.metric !== choice.value);
    });
  }
  choice.closest("[hidden]").hidden = false;
  choice.addEventListener("change", show);
  show();
})();
