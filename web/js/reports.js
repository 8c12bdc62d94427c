// Preview as Text shows the reports of LongCat's nodes as Markdown. The page does not save that switch of the node, so a
// template cannot set it.
import { app } from "../../../scripts/app.js";

const SWITCH = "preview_mode";

function showMarkdown(node) {
  const link = node.graph?.links?.get?.(node.inputs?.[0]?.link);
  const source = link && node.graph.getNodeById(link.origin_id);
  const widget = node.widgets?.find((one) => one.name === SWITCH);
  if (!widget || widget.value === true || !String(source?.type ?? "").startsWith("LongCat")) return;
  widget.value = true;
  widget.callback?.(true);
}

app.registerExtension({
  name: "longcatvideo.Reports",
  nodeCreated(node) {
    if (node.comfyClass !== "PreviewAny") return;
    const original = node.onConnectionsChange;
    node.onConnectionsChange = function (...given) {
      original?.apply(this, given);
      showMarkdown(this);
    };
  },
  loadedGraphNode(node) {
    if (node.type === "PreviewAny") showMarkdown(node);
  },
});
