"""Small CNN for 32x32 Fashion-MNIST: `features` (64-d) for a Frechet distance, logits for conditional accuracy."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file


class Classifier(nn.Module):
    def __init__(self, classes=10, feat=64):
        super().__init__()
        def block(i, o):
            return [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*block(1, 24), *block(24, 48), *block(48, 96), nn.Flatten(),
                                  nn.Linear(96 * 16, feat))
        self.head = nn.Linear(feat, classes)

    def features(self, x):          # x [N,1,32,32] in [-1,1]
        return self.body(x)

    def forward(self, x):
        return self.head(F.dropout(F.relu(self.features(x)), 0.2, self.training))


def load_classifier(path="classifier.safetensors"):
    net = Classifier()
    net.load_state_dict(load_file(path))
    return net.eval()


@torch.no_grad()
def run(net, x, batch=500):
    feats, preds = [], []
    for part in x.split(batch):
        f = net.features(part)
        feats.append(f)
        preds.append(net.head(F.relu(f)).argmax(1))
    return torch.cat(feats), torch.cat(preds)


def frechet(a, b):
    """Frechet distance between Gaussians fitted to feature sets a, b (float64, eigenvalue form)."""
    a, b = a.double(), b.double()
    ma, mb = a.mean(0), b.mean(0)
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    # trace sqrt(ca cb) = sum sqrt eig( ca^1/2 cb ca^1/2 )
    ev, vec = torch.linalg.eigh(ca)
    root = vec @ torch.diag(ev.clamp(min=0).sqrt()) @ vec.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    return float((ma - mb).square().sum() + ca.trace() + cb.trace() - 2 * cross)
