-- +goose Up

-- The log. Nothing is ever updated or deleted here. SQLite's single writer
-- makes position the order of commit.
CREATE TABLE events (
  position INTEGER PRIMARY KEY,
  stream   TEXT    NOT NULL,
  version  INTEGER NOT NULL,
  type     TEXT    NOT NULL,
  schema   INTEGER NOT NULL,
  org      TEXT    NOT NULL,
  at       INTEGER NOT NULL, -- epoch milliseconds
  data     TEXT    NOT NULL, -- JSON, as on the wire
  meta     TEXT    NOT NULL, -- JSON, event.Meta
  UNIQUE (stream, version)
) STRICT;

-- Each lock folded to its newest version, so that a long history costs nothing.
-- Written in the transaction of the append; rebuilt from the log at will.
CREATE TABLE locks (
  id      INTEGER PRIMARY KEY,
  version INTEGER NOT NULL,
  uuid    TEXT    NOT NULL UNIQUE,
  state   TEXT    NOT NULL  -- JSON, lock.State
) STRICT;

CREATE TABLE commands (
  id         TEXT    PRIMARY KEY,
  lock       INTEGER NOT NULL,
  version    INTEGER NOT NULL, -- of the lock's LockOpenRequested
  issued_at  INTEGER NOT NULL, -- epoch milliseconds, wall clock
  expires_at INTEGER NOT NULL, -- epoch milliseconds, wall clock
  ended_at   INTEGER,          -- epoch milliseconds, steady clock; NULL while pending
  outcome    TEXT              -- JSON, lock.Outcome; NULL while pending
) STRICT, WITHOUT ROWID;
CREATE INDEX commands_of_lock ON commands (lock, id);
CREATE INDEX commands_pending ON commands (id) WHERE ended_at IS NULL;

-- What makes a retry safe: requestId and Idempotency-Key of recent calls.
CREATE TABLE repeats (
  caller      TEXT    NOT NULL, -- organisation and actor, never the credential
  key         TEXT    NOT NULL, -- 'request:<lock>:<requestId>' or 'header:<Idempotency-Key>'
  fingerprint BLOB    NOT NULL,
  stream      TEXT    NOT NULL,
  version     INTEGER NOT NULL, -- after the first call
  event       INTEGER NOT NULL, -- 1 if that version's event was the first call's
  status      INTEGER NOT NULL, -- of the first answer
  command     TEXT    NOT NULL, -- '' where the call was no command to a device
  created_at  INTEGER NOT NULL, -- epoch milliseconds, steady clock
  PRIMARY KEY (caller, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX repeats_by_age ON repeats (created_at);

CREATE TABLE shadows (
  thing    TEXT NOT NULL,
  name     TEXT NOT NULL, -- '' for the classic shadow
  document BLOB NOT NULL,
  PRIMARY KEY (thing, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE organizations (
  id          TEXT PRIMARY KEY,
  name        TEXT NOT NULL,
  open_expiry INTEGER NOT NULL, -- milliseconds that an open lives; 0: the server's default
  created_at  INTEGER NOT NULL
) STRICT;

-- API keys (kind 'key') and OAuth clients of B2B services (kind 'client').
CREATE TABLE credentials (
  id         TEXT    PRIMARY KEY,
  kind       TEXT    NOT NULL,
  hash       BLOB    NOT NULL UNIQUE, -- SHA-256 of the secret
  org        TEXT    NOT NULL REFERENCES organizations (id), -- the organisation 'operator' for super keys
  super      INTEGER NOT NULL,
  name       TEXT    NOT NULL,
  scopes     TEXT    NOT NULL, -- space separated
  created_at INTEGER NOT NULL,
  expires_at INTEGER,          -- NULL: never
  revoked_at INTEGER,
  used_at    INTEGER
) STRICT;
CREATE INDEX credentials_of_org ON credentials (org, kind);

CREATE TABLE suspended_users (
  user         TEXT PRIMARY KEY,
  suspended_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE revoked_tokens (
  jti        TEXT PRIMARY KEY,
  revoked_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Certificates that devices were enrolled with.
CREATE TABLE certificates (
  serial      TEXT PRIMARY KEY, -- hexadecimal
  thing       TEXT NOT NULL,
  enrolled_at INTEGER NOT NULL,
  revoked_at  INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX certificates_of_thing ON certificates (thing);
CREATE INDEX certificates_revoked ON certificates (serial) WHERE revoked_at IS NOT NULL;

CREATE TABLE settings (
  name  TEXT PRIMARY KEY,
  value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- +goose Down
SELECT 'openlock migrates forward only';
