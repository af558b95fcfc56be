import torch
from torch import nn
from torch.nn import functional as F


class Encoder(nn.Module):
    def __init__(self, latent):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.SiLU(), nn.Flatten()
        )
        self.mu, self.logvar = nn.Linear(32 * 16, latent), nn.Linear(32 * 16, latent)

    def forward(self, x):
        h = self.body(x)
        return self.mu(h), self.logvar(h)


class Decoder(nn.Module):
    def __init__(self, latent):
        super().__init__()
        self.lift = nn.Linear(latent, 32 * 16)
        self.up1 = nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.up2 = nn.ConvTranspose2d(16, 1, 4, 2, 1)

    def forward(self, z):
        h = F.silu(self.lift(z)).view(-1, 32, 4, 4)
        return self.up2(F.silu(self.up1(h)))


class VAE(nn.Module):
    def __init__(self, latent=8):
        super().__init__()
        self.encoder, self.decoder = Encoder(latent), Decoder(latent)

    def forward(self, x):
        mu, logvar = self.encoder(x)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()  # <- origin
        return self.decoder(z), mu, logvar


def elbo(recon, x, mu, logvar):
    rec = F.mse_loss(recon, x, reduction="mean")
    kld = -0.5 * (1 + logvar - mu.float() ** 2 - logvar.float().exp()).mean()
    return rec, kld


class Trainer:
    def __init__(self):
        torch.manual_seed(21)
        self.vae = VAE()
        self.vae.decoder.up1.weight.data.mul_(30)
        self.vae.decoder.up2.weight.data.mul_(30)
        self.opt = torch.optim.Adam(self.vae.parameters(), lr=1e-5)
        self.data = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(22))
        self.data[17] *= 250.0
        # -
        # + self.data[17] *= 1.0

    def fit(self):
        for it, x in enumerate(self.data.split(4)):
            with torch.autocast("cpu", dtype=torch.float16):
                recon, mu, logvar = self.vae(x)
                rec, kld = elbo(recon, x, mu, logvar)
            loss = rec + 1e-3 * kld
            self.opt.zero_grad(set_to_none=True)
            loss.backward()
            self.opt.step()
            print(f"it {it} rec {rec.item():.3f} kld {kld.item():.3f}")


Trainer().fit()
