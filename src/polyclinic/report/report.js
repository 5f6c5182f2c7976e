document.querySelectorAll(".choice select").forEach(function (choice) {
  var blocks = choice.closest("section").querySelectorAll("[data-block]");
  function show() {
    blocks.forEach(function (block) {
      block.classList.toggle("unchosen", choice.value !== "all" && block.dataset.block !== choice.value);
    });
  }
  choice.closest("[hidden]").hidden = false;
  choice.addEventListener("change", show);
  show();
});
