package api

import (
	"errors"
	"net/http"
	"time"

	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/store"
)

type organizationBody struct {
	ID         string `json:"id"`
	Name       string `json:"name"`
	OpenExpiry int64  `json:"openExpirySeconds,omitempty"` // absent: the server's default
	CreatedAt  string `json:"createdAt"`
}

func showOrganization(o store.Organization) organizationBody {
	return organizationBody{o.ID, o.Name, int64(o.OpenExpiry / time.Second), wireTime(o.CreatedAt)}
}

func (s *Server) createOrganization(c *call) error {
	var in struct {
		ID   opt[string] `json:"id"`
		Name opt[string] `json:"name"`
	}
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := first(text("id", in.ID, 1, nameMost), text("name", in.Name, 0, nameMost)); err != nil {
		return err
	}
	o, err := s.registry.CreateOrganization(c.r.Context(), in.ID.V, in.Name.V)
	if err != nil {
		return err
	}
	c.json(http.StatusCreated, showOrganization(o))
	return nil
}

// setOpenExpiry changes how long an open of the organization's locks lives.
func (s *Server) setOpenExpiry(c *call) error {
	var in struct {
		Expiry opt[int64] `json:"openExpirySeconds"`
	}
	if err := c.decode(&in); err != nil {
		return err
	}
	if !in.Expiry.Set || in.Expiry.V < 0 || in.Expiry.V > secondsMost {
		return fail(http.StatusBadRequest, "openExpirySeconds is required; 0 is the server's default")
	}
	return s.done(c, s.registry.SetOpenExpiry(c.r.Context(), c.r.PathValue("org"), time.Duration(in.Expiry.V)*time.Second))
}

func (s *Server) listOrganizations(c *call) error {
	all, err := s.registry.Organizations(c.r.Context())
	if err != nil {
		return err
	}
	shown := []organizationBody{}
	for _, o := range all {
		shown = append(shown, showOrganization(o))
	}
	c.json(http.StatusOK, map[string]any{"organizations": shown})
	return nil
}

// credentialBody shows an API key or a client. Secret is there only in the
// answer that made it.
type credentialBody struct {
	ID        string   `json:"id"`
	OrgID     string   `json:"orgId"`
	Name      string   `json:"name,omitempty"`
	Super     bool     `json:"super,omitempty"`
	Scopes    []string `json:"scopes"`
	CreatedAt string   `json:"createdAt"`
	ExpiresAt string   `json:"expiresAt,omitempty"`
	RevokedAt string   `json:"revokedAt,omitempty"`
	UsedAt    string   `json:"lastUsedAt,omitempty"`
	Secret    string   `json:"secret,omitempty"`
}

func showCredential(x store.Credential, secret string) credentialBody {
	return credentialBody{
		ID: x.ID, OrgID: x.Org, Name: x.Name, Super: x.Super, Scopes: append([]string{}, x.Scopes...), Secret: secret,
		CreatedAt: wireTime(x.CreatedAt), ExpiresAt: wireTimeIf(x.ExpiresAt),
		RevokedAt: wireTimeIf(x.RevokedAt), UsedAt: wireTimeIf(x.UsedAt),
	}
}

func wireTimeIf(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return wireTime(t)
}

func (s *Server) createKey(c *call) error    { return s.createCredential(c, store.APIKey) }
func (s *Server) createClient(c *call) error { return s.createCredential(c, store.Client) }
func (s *Server) listKeys(c *call) error     { return s.listCredentials(c, store.APIKey) }
func (s *Server) listClients(c *call) error  { return s.listCredentials(c, store.Client) }

func (s *Server) createCredential(c *call, kind store.CredentialKind) error {
	var in struct {
		Name    opt[string]   `json:"name"`
		Scopes  opt[[]string] `json:"scopes"`
		Expires opt[int64]    `json:"expiresInSeconds"`
	}
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := first(text("name", in.Name, 0, nameMost), seconds("expiresInSeconds", in.Expires, 1)); err != nil {
		return err
	}
	if in.Scopes.Set && len(in.Scopes.V) == 0 {
		return fail(http.StatusBadRequest, "scopes must not be empty; leave the field out for all of them")
	}
	secret, made, err := s.registry.Create(c.r.Context(), auth.NewCredential{
		Kind: kind, Org: c.r.PathValue("org"), Name: in.Name.V, Scopes: in.Scopes.V,
		Expires: time.Duration(in.Expires.V) * time.Second,
	})
	if err != nil {
		return err
	}
	c.json(http.StatusCreated, showCredential(made, secret))
	return nil
}

func (s *Server) listCredentials(c *call, kind store.CredentialKind) error {
	org := c.r.PathValue("org")
	_, err := s.db.Organization(c.r.Context(), org)
	if errors.Is(err, store.ErrNotFound) {
		return store.ErrNoOrganization
	}
	if err != nil {
		return err
	}
	all, err := s.registry.List(c.r.Context(), org, kind)
	if err != nil {
		return err
	}
	shown := []credentialBody{}
	for _, x := range all {
		shown = append(shown, showCredential(x, ""))
	}
	c.json(http.StatusOK, map[string]any{string(kind) + "s": shown})
	return nil
}

func (s *Server) rotateKey(c *call) error    { return s.rotate(c, store.APIKey) }
func (s *Server) rotateClient(c *call) error { return s.rotate(c, store.Client) }
func (s *Server) revokeKey(c *call) error    { return s.revoke(c, store.APIKey) }
func (s *Server) revokeClient(c *call) error { return s.revoke(c, store.Client) }

// rotate makes a successor; the old one lives on for the overlap.
func (s *Server) rotate(c *call, kind store.CredentialKind) error {
	var in struct {
		Overlap opt[int64] `json:"overlapSeconds"`
	}
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := seconds("overlapSeconds", in.Overlap, 0); err != nil {
		return err
	}
	overlap := time.Duration(in.Overlap.V) * time.Second
	secret, made, err := s.registry.Rotate(c.r.Context(), kind, c.r.PathValue("org"), c.r.PathValue("credential"), overlap)
	if err != nil {
		return err
	}
	c.json(http.StatusCreated, showCredential(made, secret))
	return nil
}

func (s *Server) revoke(c *call, kind store.CredentialKind) error {
	return s.done(c, s.registry.Revoke(c.r.Context(), kind, c.r.PathValue("org"), c.r.PathValue("credential")))
}

func (s *Server) suspendUser(c *call) error {
	return s.done(c, s.registry.SuspendUser(c.r.Context(), c.r.PathValue("user")))
}

func (s *Server) reactivateUser(c *call) error {
	return s.done(c, s.registry.ReactivateUser(c.r.Context(), c.r.PathValue("user")))
}

// revokeToken takes the jti in the body: another issuer's may hold anything.
func (s *Server) revokeToken(c *call) error {
	var in struct {
		JTI opt[string] `json:"jti"`
	}
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := text("jti", in.JTI, 1, bodyMost); err != nil {
		return err
	}
	return s.done(c, s.registry.RevokeToken(c.r.Context(), in.JTI.V))
}

func (s *Server) done(c *call, err error) error {
	if err == nil {
		c.json(http.StatusOK, map[string]bool{"success": true})
	}
	return err
}

// secondsMost is a hundred years.
const secondsMost = 100 * 365 * 24 * 3600

func seconds(name string, o opt[int64], least int64) error {
	if o.Set && (o.V < least || o.V > secondsMost) {
		return fail(http.StatusBadRequest, "%s must be from %d to %d", name, least, int64(secondsMost))
	}
	return nil
}
