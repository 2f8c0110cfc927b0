(function () {
  "use strict";
  var root = document.documentElement;
  // #theme=dark or ?theme=dark in the address wins, then the reader's earlier choice, then the system's setting.
  var asked = /[#?&]theme=(light|dark)/.exec(location.hash + location.search);
  var chosen = asked && asked[1];
  try { chosen = chosen || localStorage.getItem("paraboloid-theme"); } catch (blocked) { /* a file without storage */ }
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  document.getElementById("theme").addEventListener("click", function () {
    var dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("paraboloid-theme", root.dataset.theme); } catch (blocked) { /* not kept, then */ }
  });
})();
