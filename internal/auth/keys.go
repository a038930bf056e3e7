package auth

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/openlock/openlock/internal/access"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/store"
)

// Prefixes of secrets, so that people and scanners recognise one that leaked.
const (
	KeyPrefix    = "olk_" // API keys
	SecretPrefix = "ols_" // secrets of OAuth clients
)

// OperatorOrg is the organisation that super keys are filed under. It owns no
// locks.
const OperatorOrg = "operator"

// ErrInput says that what was asked for makes no sense; the text says why.
var ErrInput = errors.New("invalid request")

// Registry creates and ends organisations' credentials.
type Registry struct {
	db    *store.DB
	clock clock.Clock
}

// NewRegistry works on a database.
func NewRegistry(db *store.DB, c clock.Clock) *Registry { return &Registry{db: db, clock: c} }

var orgID = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// Bounds of how long an open lives, from the receipt of the request.
const (
	OpenExpiryLeast = 2 * time.Second
	OpenExpiryMost  = 30 * time.Second
)

// checkOpenExpiry takes 0, the server's default, and what lies within bounds.
func checkOpenExpiry(d time.Duration) error {
	if d != 0 && (d < OpenExpiryLeast || d > OpenExpiryMost) {
		return fmt.Errorf("%w: an open lives from %s to %s", ErrInput, OpenExpiryLeast, OpenExpiryMost)
	}
	return nil
}

// SetOpenExpiry changes how long an open of an organization's locks lives; 0
// is the server's default. Refuses with ErrInput and store.ErrNoOrganization.
func (r *Registry) SetOpenExpiry(ctx context.Context, org string, d time.Duration) error {
	if err := checkOpenExpiry(d); err != nil {
		return err
	}
	err := r.db.SetOpenExpiry(ctx, org, d)
	if errors.Is(err, store.ErrNotFound) {
		err = store.ErrNoOrganization
	}
	return err
}

// CreateOrganization refuses with ErrInput and store.ErrExists.
func (r *Registry) CreateOrganization(ctx context.Context, id, name string) (store.Organization, error) {
	if !orgID.MatchString(id) || id == OperatorOrg {
		return store.Organization{}, fmt.Errorf("%w: an organization id is 1 to 63 of a-z 0-9 . _ - and starts with a letter or digit; %q is reserved", ErrInput, OperatorOrg)
	}
	if name == "" {
		name = id
	}
	o := store.Organization{ID: id, Name: name, CreatedAt: r.clock.Wall()}
	return o, r.db.CreateOrganization(ctx, o)
}

// NewCredential describes a credential to be made.
type NewCredential struct {
	Kind    store.CredentialKind
	Org     string
	Super   bool // an operator's key: Org and Scopes are not used
	Name    string
	Scopes  []string      // all if empty
	Expires time.Duration // from now; 0: never
}

// Create makes a credential and answers with its secret, which is shown this
// once and never kept. Refuses with ErrInput and store.ErrNoOrganization.
func (r *Registry) Create(ctx context.Context, n NewCredential) (secret string, c store.Credential, err error) {
	if secret, c, err = r.prepare(n); err != nil {
		return "", c, err
	}
	if n.Super {
		if err := r.operator(ctx); err != nil {
			return "", c, err
		}
	}
	if err := r.db.CreateCredential(ctx, c); err != nil {
		return "", c, err
	}
	return secret, c, nil
}

// Rotate makes a credential like an old one, which ends after the overlap.
// Refuses with store.ErrNotFound.
func (r *Registry) Rotate(ctx context.Context, kind store.CredentialKind, org, id string, overlap time.Duration) (secret string, c store.Credential, err error) {
	if overlap < 0 {
		return "", c, fmt.Errorf("%w: overlap must not be negative", ErrInput)
	}
	old, err := r.find(ctx, kind, org, id)
	if err != nil {
		return "", c, err
	}
	if !old.Stands(r.clock.Wall()) {
		return "", c, fmt.Errorf("%w: %s is revoked or expired; create a new one", ErrInput, id)
	}
	n := NewCredential{Kind: old.Kind, Org: org, Super: old.Super, Name: old.Name, Scopes: old.Scopes}
	if !old.ExpiresAt.IsZero() {
		n.Expires = old.ExpiresAt.Sub(old.CreatedAt)
	}
	if secret, c, err = r.prepare(n); err != nil {
		return "", c, err
	}
	return secret, c, r.db.RotateCredential(ctx, id, r.clock.Wall().Add(overlap), c)
}

// Revoke ends a credential at once. Refuses with store.ErrNotFound.
func (r *Registry) Revoke(ctx context.Context, kind store.CredentialKind, org, id string) error {
	if _, err := r.find(ctx, kind, org, id); err != nil {
		return err
	}
	return r.db.RevokeCredential(ctx, org, id, r.clock.Wall())
}

func (r *Registry) find(ctx context.Context, kind store.CredentialKind, org, id string) (store.Credential, error) {
	c, err := r.db.Credential(ctx, org, id)
	if err == nil && c.Kind != kind {
		err = store.ErrNotFound
	}
	return c, err
}

// List shows an organisation's credentials of a kind, without secrets.
func (r *Registry) List(ctx context.Context, org string, kind store.CredentialKind) ([]store.Credential, error) {
	return r.db.Credentials(ctx, org, kind)
}

// Organizations lists them, the operator's own left out.
func (r *Registry) Organizations(ctx context.Context) ([]store.Organization, error) {
	all, err := r.db.Organizations(ctx)
	return slices.DeleteFunc(all, func(o store.Organization) bool { return o.ID == OperatorOrg }), err
}

// SuspendUser makes all tokens of a user invalid. Refuses with ErrInput.
func (r *Registry) SuspendUser(ctx context.Context, user string) error {
	if err := checkUserID(user); err != nil {
		return err
	}
	return r.db.SuspendUser(ctx, user, r.clock.Wall())
}

// ReactivateUser ends a suspension. Refuses with ErrInput.
func (r *Registry) ReactivateUser(ctx context.Context, user string) error {
	if err := checkUserID(user); err != nil {
		return err
	}
	return r.db.ReactivateUser(ctx, user)
}

func checkUserID(user string) error {
	if !canonicalUUID(user) {
		return fmt.Errorf("%w: a user is named by a lower-case UUID", ErrInput)
	}
	return nil
}

// RevokeToken makes the token with a jti invalid. Refuses with ErrInput.
func (r *Registry) RevokeToken(ctx context.Context, jti string) error {
	if jti == "" {
		return fmt.Errorf("%w: name the token by its jti", ErrInput)
	}
	return r.db.RevokeToken(ctx, jti, r.clock.Wall())
}

func (r *Registry) operator(ctx context.Context) error {
	err := r.db.CreateOrganization(ctx, store.Organization{ID: OperatorOrg, Name: "Operator", CreatedAt: r.clock.Wall()})
	if errors.Is(err, store.ErrExists) {
		return nil
	}
	return err
}

func (r *Registry) prepare(n NewCredential) (secret string, c store.Credential, err error) {
	if n.Expires < 0 {
		return "", c, fmt.Errorf("%w: expiry must lie in the future", ErrInput)
	}
	if n.Org == OperatorOrg && !n.Super {
		return "", c, fmt.Errorf("%w: the operator has super keys only: openlock key create --super", ErrInput)
	}
	if err := checkScopes(n.Scopes); err != nil {
		return "", c, err
	}
	prefix := KeyPrefix
	if n.Kind == store.Client {
		prefix = SecretPrefix
	}
	// 52 characters of base32, 260 bits (crypto/rand.Text twice).
	secret = prefix + strings.ToLower(rand.Text()+rand.Text())
	hash := sha256.Sum256([]byte(secret))
	now := r.clock.Wall()
	c = store.Credential{
		ID: uuid.Must(uuid.NewV7()).String(), Kind: n.Kind, Hash: hash[:], Org: n.Org, Super: n.Super,
		Name: n.Name, Scopes: n.Scopes, CreatedAt: now,
	}
	if n.Super {
		c.Org, c.Scopes = OperatorOrg, nil
	} else if len(c.Scopes) == 0 {
		for _, s := range access.Scopes {
			c.Scopes = append(c.Scopes, string(s))
		}
	}
	if n.Expires > 0 {
		c.ExpiresAt = now.Add(n.Expires)
	}
	return secret, c, nil
}

func checkScopes(names []string) error {
	for _, n := range names {
		if !slices.Contains(access.Scopes, access.Scope(n)) {
			return fmt.Errorf("%w: unknown scope %q; there are %v", ErrInput, n, access.Scopes)
		}
	}
	return nil
}
